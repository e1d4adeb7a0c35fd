"""Losing label shards costs the lost ones alone: all are counted, given up by name, and nothing intact is touched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.errors import IntegrityError
from orchestrator.store import label_repair
from orchestrator.store.label_log import LabelLog
from orchestrator.store.label_repair import count, examine, give_up
from tests.label_logs import commit_all, flip, labels_of, manifest_of, tokens_of, verified
from tests.tiny import contents

SHARDS = 12
HALF = range(0, SHARDS, 2)


@pytest.fixture
def damaged(log: LabelLog) -> LabelLog:
    """A sealed log of 12 shards of which four are gone, one is flipped and one has a broken commit record."""
    tokens = [tokens_of(shard) for shard in range(SHARDS)]
    records = commit_all(log, tokens)
    log.seal(range(SHARDS), manifest_of(log.store, tokens))
    for shard in (0, 2, 4, 6):
        data_file(log, records[shard].file).unlink()
    flip(data_file(log, records[8].file), bit=1234)
    log.store.path(f"{log.folder}/commits/000010.json").write_bytes(b"{}")
    return log


def data_file(log: LabelLog, name: str) -> Path:
    return log.store.path(f"{log.folder}/data/{name}")


def folder(log: LabelLog) -> Path:
    return log.store.path(log.folder)


def test_every_loss_is_counted(damaged: LabelLog) -> None:
    intact, losses = examine(damaged)
    assert list(intact) == [1, 3, 5, 7, 9, 11]
    assert [(loss.shard, loss.missing) for loss in losses] == [*((s, True) for s in (0, 2, 4, 6)), (8, False), (10, False)]
    assert count(losses) == "4 missing, 2 damaged"


def test_what_is_given_up_is_labelled_again_and_nothing_else(damaged: LabelLog) -> None:
    before = contents(folder(damaged))
    intact, losses = examine(damaged)
    assert give_up(damaged, losses) == list(HALF)
    after = contents(folder(damaged))
    assert after.items() <= before.items(), "only removed"
    kept = {f"commits/{shard:06d}.json" for shard in intact} | {f"data/{record.file}" for record in intact.values()}
    whole = {file for file in before if file.startswith("data/000010-")}  # its commit record alone was damaged
    assert set(after) == kept | whole | {"key.json"}
    assert damaged.missing(range(SHARDS)) == list(HALF)
    assert give_up(damaged, losses) == [0, 2, 4, 6, 8, 10], "no record: still lost, and nothing left to remove"
    assert contents(folder(damaged)) == after
    for shard in HALF:  # the same labels under the same file names, as a run would write them
        damaged.commit(shard, tokens_of(shard), labels_of(tokens_of(shard)))
    assert [shard for shard, _ in verified(damaged)] == list(range(SHARDS))
    assert give_up(damaged, losses) == [], "what is intact by now is not touched, whatever was said of it before"
    assert [shard for shard, _ in verified(damaged)] == list(range(SHARDS))


def test_an_intact_log_is_left_alone(log: LabelLog) -> None:
    commit_all(log, [tokens_of(shard) for shard in range(3)])
    before = contents(folder(log))
    assert give_up(log, examine(log)[1]) == [] and contents(folder(log)) == before


def test_what_all_shards_depend_on_cannot_be_given_up_shard_by_shard(log: LabelLog) -> None:
    commit_all(log, [tokens_of(0)])
    log.keep("basis", b"of all shards")
    (file,) = folder(log).glob("basis-*")
    file.unlink()
    _, losses = examine(log)
    assert [(loss.shard, loss.missing) for loss in losses] == [(None, True)]
    before = contents(folder(log))
    with pytest.raises(IntegrityError, match="all shards depend on is lost; remove this folder and run the job again"):
        give_up(log, losses)
    assert contents(folder(log)) == before


@pytest.mark.parametrize("reader", ["read", "seal"])
def test_a_run_that_meets_a_loss_names_the_way_out(damaged: LabelLog, reader: str) -> None:
    record = damaged.committed(0)
    assert record is not None
    with pytest.raises(IntegrityError) as caught:
        if reader == "read":
            damaged.read(0, record, tokens_of(0))
        else:
            damaged.store.remove(f"{damaged.folder}/sealed")  # as if these shards had never been compared with their tokens
            damaged.seal([0, 1], manifest_of(damaged.store, [tokens_of(0), tokens_of(1)]))
    assert str(caught.value).startswith("label shard 0: the file ")
    assert f"distill labels repair {folder(damaged)}" in str(caught.value)


def test_as_commands(damaged: LabelLog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distill", "labels", *args])
        with pytest.raises(SystemExit) as ending:
            main()
        return int(ending.value.code or 0), *capsys.readouterr()

    log = str(folder(damaged))
    code, out, err = run("verify", log)
    assert code == 5 and out.endswith("6 shards, 24 rows: intact\n") and len(out.splitlines()) == 7
    assert err == f"distill: {log}: 4 missing, 2 damaged; distill labels repair {log} has them labelled again\n"
    before = contents(folder(damaged))
    code, out, _ = run("repair", log, "--dry-run")
    assert code == 0 and "would be given up" in out and contents(folder(damaged)) == before
    code, out, _ = run("repair", log)
    assert code == 0 and "6 shards given up, 6 intact shards stay; run the job again" in out
    assert run("verify", log) == (0, "6 shards, 24 rows: intact\n", "")
    assert "nothing to repair" in run("repair", log)[1]


def test_a_shard_that_is_made_again_meanwhile_stays(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that labels between the look and the removal: its shard is looked at once more."""
    (record,) = commit_all(log, [tokens_of(0)])
    data_file(log, record.file).unlink()
    _, losses = examine(log)
    looked = label_repair.look

    def late(log: LabelLog, shard: int) -> object:
        log.commit(shard, tokens_of(shard), labels_of(tokens_of(shard)))
        return looked(log, shard)

    monkeypatch.setattr(label_repair, "look", late)
    assert give_up(log, losses) == [] and [shard for shard, _ in verified(log)] == [0]
