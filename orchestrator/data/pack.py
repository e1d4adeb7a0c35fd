"""Documents to training windows to token shards, one piece of the corpus at a time."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orchestrator.data.sizing import cut_evenly, group_rows
from orchestrator.data.sources import Document, Piece, read_piece
from orchestrator.data.split import heldout_draw, is_heldout
from orchestrator.data.tokenizer import TokenizerFacts, decode_document, special_tokens
from orchestrator.errors import DataError
from orchestrator.plan.order import shuffled
from orchestrator.spec.data import Data
from orchestrator.store.files import Store
from orchestrator.store.records import Record, ShardRecord
from orchestrator.store.shards import ROW_ID_BYTES, TokenShard, put_tokens

DOCUMENTS_PER_CALL = 64
HELDOUT_WINDOWS_PER_DOCUMENT = 16
"""Upper limit on the windows taken from one held-out document, so that a single long one does not dominate the evaluation."""


class PackedPiece(Record):
    """The result of packing one piece of the corpus: its shards and its counts."""

    train: tuple[ShardRecord, ...]
    heldout: tuple[ShardRecord, ...]
    documents: int
    heldout_documents: int
    skipped_documents: int
    dropped_tokens: int
    targets: int
    """Training positions that are learnt from."""
    special_documents: int = 0
    """Documents that contain the text of a special token."""


@dataclass
class _Windows:
    """Packs a stream of documents into overlapping windows of seq_len + 1 ids."""

    seq_len: int
    facts: TokenizerFacts
    rows: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    """For each row, a mask of its targets that are learnt."""
    row_ids: list[bytes] = field(default_factory=list)
    row_documents: list[bytes] = field(default_factory=list)
    """For each row, the document that its first target belongs to, identified by its content."""
    without_target: int = 0
    """Windows left out because nothing in them is learnt."""
    _open: list[int] = field(default_factory=list)
    _learnt: list[bool] = field(default_factory=list)
    """For each of `_open`."""
    _origin: deque[tuple[str, int, int]] = field(default_factory=deque)
    """(document, first position, ids left) of the documents in `_open`."""
    documents: int = 0

    def add(self, document: str, ids: list[int], context: int) -> None:
        """Append a document (by content hash, in hex, and name), whose first `context` ids are no targets, and cut the
        windows it completes.

        A window begins with the BOS id where the tokenizer uses one; otherwise two neighbours share one id. Either
        way every id of the stream is a target exactly once.
        """
        self.documents += 1
        if self.facts.separator is not None:
            ids = [*ids, self.facts.separator]
        self._origin.append((document, 0, len(ids)))
        self._open.extend(ids)
        self._learnt.extend(position >= context for position in range(len(ids)))
        prefix = [] if self.facts.bos is None else [self.facts.bos]
        content = self.seq_len + 1 - len(prefix)
        start = 0
        while len(self._open) - start >= content:
            mask = np.array(self._learnt[start : start + content][-self.seq_len :])
            if mask.any():
                self.rows.append(np.array(prefix + self._open[start : start + content], dtype=np.int32))
                self.masks.append(mask)
                self.row_ids.append(_row_id(*self._origin[0][:2]))
                first_target = content - self.seq_len + int(mask.argmax())
                self.row_documents.append(bytes.fromhex(self._document_at(first_target)[: 2 * ROW_ID_BYTES]))
            else:
                self.without_target += 1
            start += self.seq_len
            self._leave_behind(self.seq_len)
        del self._open[:start], self._learnt[:start]

    def _document_at(self, position: int) -> str:
        """The document of the open id at `position`, counted from where the next window starts."""
        for document, _, left in self._origin:
            if position < left:
                return document
            position -= left
        raise IndexError(position)

    def _leave_behind(self, count: int) -> None:
        while count:
            document, position, left = self._origin.popleft()
            used = min(count, left)
            count -= used
            if used < left:
                self._origin.appendleft((document, position + used, left - used))

    @property
    def tail(self) -> int:
        """Ids that are in no window yet; without BOS the first open one is also the last of the window before."""
        cut = self.rows or self.without_target
        return len(self._open) - (1 if cut and self.facts.bos is None else 0)

    @property
    def dropped(self) -> int:
        """Ids that are the target of no window."""
        return self.tail + self.without_target * self.seq_len

    @property
    def targets(self) -> int:
        """Positions that are learnt from."""
        return sum(int(mask.sum()) for mask in self.masks)


def pack_piece(store: Store, folder: str, data: Data, piece: Piece, facts: TokenizerFacts) -> PackedPiece:
    """Tokenize `piece`, split off held-out documents, and store its shards under `folder`, of the sizes in `data`.

    Idempotent: a piece that was finished before is not read again.
    """
    key = piece_key(folder, piece.index)
    done = PackedPiece.load(store, key)
    if done is not None:
        return done
    train, heldout = _Windows(data.seq_len, facts), _Windows(data.seq_len, facts)
    skipped = cut = special = 0
    most = HELDOUT_WINDOWS_PER_DOCUMENT * data.seq_len
    tokenizer = store.local(f"{folder}/tokenizer") / "tokenizer.json"
    for document in _tokenized(data, piece, tokenizer):
        if document is None:
            skipped += 1
            continue
        special += document.special
        name, ids = f"{document.content}:{document.name}", document.ids
        if is_heldout(heldout_draw(document.content, data.seed), data.heldout_fraction):
            heldout.add(name, ids[:most], document.context)
            cut += len(ids[most:])
        else:
            train.add(name, ids, document.context)
    packed = PackedPiece(
        train=_store_rows(store, f"{folder}/train", data, piece, train),
        heldout=_store_rows(store, f"{folder}/heldout", data, piece, heldout, heldout.row_documents),
        documents=train.documents,
        heldout_documents=heldout.documents,
        skipped_documents=skipped,
        dropped_tokens=train.dropped + heldout.dropped + cut,
        targets=train.targets,
        special_documents=special,
    )
    store.put_if_absent(key, packed.model_dump_json().encode())
    return packed


def piece_key(folder: str, piece: int) -> str:
    """Return the key of the record of a packed piece."""
    return f"{folder}/pieces/{piece:06d}.json"


class _Tokenized(NamedTuple):
    """A document as ids, of which the first `context` are its prompt's."""

    name: str
    content: str
    """Hex SHA-256."""
    ids: list[int]
    context: int
    special: bool
    """True if the document's text contains the text of a special token."""


def _tokenized(data: Data, piece: Piece, tokenizer_file: Path) -> Iterator[_Tokenized | None]:
    """Every document of `piece`; None for one that is skipped."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = data.special_tokens_in_text != "allow"
    special = special_tokens(tokenizer)
    for group in _groups(read_piece(data.source, piece)):
        # A prompt is encoded by itself, so that no token stands across the place where learning begins.
        decoded = [(decode_document(data, d.name, d.prompt), decode_document(data, d.name, d.text)) for d in group]
        kept = [both if both[0] is not None and both[1] else None for both in decoded]
        encoded = iter(tokenizer.encode_batch([part or "" for both in kept if both for part in both], add_special_tokens=False))
        for document, both in zip(group, kept, strict=True):
            if both is None:
                yield None
                continue
            here = special.search(both[0] or "") or special.search(both[1] or "")
            if here and data.special_tokens_in_text == "error":
                ways = "data.special_tokens_in_text: encode_as_text | allow"
                raise DataError(f"{document.name}: contains the special token {here[0]} ({ways})")
            prompt, text = next(encoded).ids, next(encoded).ids
            content = hashlib.sha256(document.prompt + document.text).hexdigest()
            yield _Tokenized(document.name, content, prompt + text, len(prompt), here is not None)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == DOCUMENTS_PER_CALL:
            yield group
            group = []
    if group:
        yield group


def _row_id(document: str, position: int) -> bytes:
    return hashlib.sha256(f"{document}:{position}".encode(errors="replace")).digest()[:ROW_ID_BYTES]


def _store_rows(
    store: Store, folder: str, data: Data, piece: Piece, windows: _Windows, row_documents: list[bytes] | None = None
) -> tuple[ShardRecord, ...]:
    """Shuffle the windows of a piece and cut them into shards, which keep `row_documents` if given."""
    assert data.rows_per_shard is not None
    group = group_rows(data)
    order = shuffled(len(windows.rows), data.seed, piece.index)
    records: list[ShardRecord] = []
    for part in cut_evenly(len(order), data.rows_per_shard // group * group, group):
        chosen = [int(i) for i in order[part]]
        masks = np.stack([windows.masks[i] for i in chosen]) if data.source.prompt else None
        documents = [row_documents[i] for i in chosen] if row_documents else None
        ids = np.stack([windows.rows[i] for i in chosen])
        shard = TokenShard([windows.row_ids[i] for i in chosen], ids, masks, documents)
        records.append(put_tokens(store, folder, len(records), shard, group))
    return tuple(records)
