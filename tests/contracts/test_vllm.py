"""Labels through vLLM's API: a server of the documented replies, which says what a model in this process computes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from urllib3.util import Retry

from orchestrator.errors import DataError, DistillError, EnvironmentFault, IntegrityError, SpecError
from orchestrator.labelling import _named_server
from orchestrator.labels.kinds import label_kind
from orchestrator.labels.layout import Arrays, Frame
from orchestrator.models.build import build_model
from orchestrator.spec.labels import TopkLabels
from orchestrator.spec.model import Model, TransformersTeacher, VllmServer
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.teacher import vllm
from orchestrator.teacher.backend import Replica, Teacher, TransformersBackend
from orchestrator.teacher.probe import PROBE, check_probe
from orchestrator.teacher.vllm import VllmBackend

VOCAB, SEQ, K, LIMIT, KEY = 61, 12, 8, 20, "token-of-the-test"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


class Server(ThreadingHTTPServer):
    """What `vllm serve` answers to completions; the numbers are those of `model`."""

    def __init__(self, model: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.key, self.name = model, "", "tiny"
        self.failures: list[int] = []
        """Statuses of the next replies."""
        self.places_kept, self.asked, self.shift = 10**6, 0, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def completion(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked, prompt = request["prompt_logprobs"], request["prompt"]
        if asked > LIMIT:
            message = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {LIMIT}"
            return 400, {"error": {"message": message, "type": "BadRequestError", "param": "prompt_logprobs", "code": 400}}
        with torch.inference_mode():
            log_probs = self.model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        places: list[dict[str, Any] | None] = [None]
        for here, following in zip(log_probs[:-1], prompt[1:], strict=True):
            ids = dict.fromkeys([following, *here.topk(asked).indices.tolist()])  # the one that stands there comes first
            places.append({str(i): {"logprob": float(here[i]) + self.shift, "rank": int((here >= here[i]).sum())} for i in ids})
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        choice |= {"prompt_logprobs": places[: self.places_kept]}
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": request["model"], "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply(
            200,
            {
                "object": "list",
                "data": [
                    {"id": self.server.name, "root": f"/models/{self.server.name}", "object": "model", "max_model_len": SEQ + 2}
                ],
            },
        )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        if self.server.failures:
            self._reply(self.server.failures.pop(0), {"error": {"message": "busy"}})
        else:
            self._reply(*self.server.completion(request))

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            status, body = 401, {"error": "Unauthorized"}
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    build_model(Model(config=SMALL), VOCAB, 5, "teacher").save_pretrained(folder)
    return folder


@pytest.fixture
def local(folder: Path) -> TransformersBackend:
    return TransformersBackend(Replica(str(folder), "fp32"))


@pytest.fixture
def server(local: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(vllm, "TRIES", Retry(total=3, backoff_factor=0.01, status_forcelist=(503,), allowed_methods=None))
    with Server(local.model) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def backend(server: Server, k: int = K, model: str | None = None, vocab: int = VOCAB) -> VllmBackend:
    return VllmBackend(VllmServer(url=server.url, model=model), k, vocab)


def token_ids(seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (3, SEQ), generator=torch.Generator().manual_seed(seed))


def labels(teacher: Teacher, ids: torch.Tensor, k: int = K) -> Arrays:
    kind = label_kind(TopkLabels(kind="topk", k=k), Frame(VOCAB, SEQ))
    return kind.unpack(kind.pack(kind.extract(teacher.answer(ids), [b""] * len(ids))))


@pytest.mark.parametrize("k", [1, K, LIMIT])
def test_labels_are_those_of_the_model_that_is_served(seed: int, server: Server, local: TransformersBackend, k: int) -> None:
    ids = token_ids(seed)
    found, expected = labels(backend(server, k), ids, k), labels(local, ids, k)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found["ids"], expected["ids"])
    np.testing.assert_allclose(found["logprobs"].astype(float), expected["logprobs"].astype(float), rtol=2e-3)
    tail = next(name for name in expected if name.startswith("tail"))
    np.testing.assert_allclose(found[tail], expected[tail], atol=1e-5)
    assert not np.array_equal(found["ids"], labels(local, token_ids(seed + 1), k)["ids"]), "other rows have other labels"


def test_it_tells_how_likely_the_text_is(seed: int, server: Server, local: TransformersBackend) -> None:
    """Whatever k is: the id that stands in a place is named there too."""
    ids = torch.randint(VOCAB, (3, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        log_probs = local.model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
    expected = log_probs.gather(2, ids[:, 1:, None])[..., 0]
    found = backend(server, 1).target_log_probs(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert bool((log_probs.argmax(-1) != ids[:, 1:]).any()), "most are not the most likely"


def test_a_server_that_is_away_for_a_moment_costs_nothing(seed: int, server: Server) -> None:
    teacher = backend(server)
    server.failures, before = [503, 503], server.asked
    assert torch.isfinite(teacher.answer(token_ids(seed)).states).all()
    assert server.failures == [] and server.asked == before + 5, "two were asked again"


def test_the_key_is_taken_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = KEY
    with pytest.raises(EnvironmentFault, match="answered 401"):
        backend(server)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    backend(server)


@pytest.mark.parametrize(
    ("asked", "fault", "words"),
    [
        ({"k": LIMIT + 1}, SpecError, rf"^labels\.k: .* --max-logprobs {LIMIT + 1}: .*max allowed: {LIMIT}"),
        ({"model": "other"}, SpecError, r"^teacher\.vllm\.model: .* serves tiny, not other"),
        ({"vocab": 9}, DataError, r"^teacher\.vllm: .* named ids beyond the vocabulary of 9"),
    ],
)
def test_what_the_server_does_not_serve(server: Server, asked: Any, fault: type[DistillError], words: str) -> None:
    with pytest.raises(fault, match=words):
        backend(server, **asked)


@pytest.mark.parametrize("shift", [5.0, 1000.0])  # of which the exponential is no float
def test_replies_that_are_no_log_probabilities(server: Server, shift: float) -> None:
    server.shift = shift
    with pytest.raises(DataError, match=r"^teacher\.vllm: .* told no log-probabilities"):
        backend(server)


def test_replies_that_say_too_little(seed: int, server: Server) -> None:
    teacher = backend(server)
    server.places_kept = SEQ
    with pytest.raises(DataError, match=rf"said something about {SEQ} of {SEQ + 1} places"):
        teacher.answer(token_ids(seed))
    with pytest.raises(EnvironmentFault, match=r"teacher\.vllm.* answered 500: .*busy"):
        server.failures = [500]
        backend(server)


# Which model it is.


def other_model(seed: int) -> Any:
    """A model of the same sizes with other weights."""
    return build_model(Model(config=SMALL), VOCAB, seed, "teacher").eval()


def test_another_model_under_the_same_name_does_not_continue_a_log(seed: int, server: Server, log: LabelLog) -> None:
    ids = token_ids(seed)
    for prompts in (ids, token_ids(seed + 1)):  # what is asked is what was asked first
        check_probe(log, backend(server), prompts, "tiny")
    kept = log.kept(PROBE)
    server.model = other_model(seed)
    with pytest.raises(
        IntegrityError, match=rf"^teacher\.vllm: tiny is another model .*{re.escape(log.folder)}: .* at \d+% of"
    ):
        check_probe(log, backend(server), ids, "tiny")
    assert log.kept(PROBE) == kept and kept is not None


@pytest.mark.parametrize(("noise", "same"), [(0.0001, True), (0.05, False)])
def test_rounding_is_no_other_model(seed: int, server: Server, log: LabelLog, folder: Path, noise: float, same: bool) -> None:
    ids = torch.randint(VOCAB, (8, SEQ), generator=torch.Generator().manual_seed(seed))
    check_probe(log, backend(server), ids, "tiny")
    server.model = TransformersBackend(Replica(str(folder), "fp32")).model
    for weight in server.model.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    if same:
        check_probe(log, backend(server), ids, "tiny")
    else:
        with pytest.raises(IntegrityError):
            check_probe(log, backend(server), ids, "tiny")


def test_the_first_models_name_is_looked_up(server: Server, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []

    def named(path: str, model: str | None = None) -> str | None:
        teacher = TransformersTeacher(kind="transformers", path=path, vllm=VllmServer(url=server.url, model=model))
        found = _named_server(cast(Any, SimpleNamespace(job=SimpleNamespace(teacher=teacher), store=store, warn=warned.append)))
        return found and found.model

    assert named("maker/tiny") == "tiny" and named("/models/tiny/", model="given") == "given" and warned == []
    assert named("maker/large") == "tiny"
    assert len(warned) == 1 and "serves tiny, which is called otherwise than teacher.path maker/large" in warned[0]
    server.name = "next"
    assert named("maker/next") == "next", "and so labels go into another log"
    monkeypatch.setattr(server, "key", "a key that we lack")
    assert named("maker/next") == "next", "a server that does not answer stands for what it last served"
    store.remove("names")
    with pytest.raises(EnvironmentFault):
        named("maker/next")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "TRIES", Retry(total=0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = VllmServer(url=f"http://127.0.0.1:{closed.server_address[1]}")
    with pytest.raises(EnvironmentFault, match=r"^teacher\.vllm\.url: .* does not answer"):
        VllmBackend(url, K, VOCAB)
