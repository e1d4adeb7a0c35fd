"""A teacher behind vLLM's OpenAI-compatible server, which runs where and in which environment it likes.

Of every position the server tells the k most likely ids (`prompt_logprobs`), no more: enough for top-k labels at temperature 1
with their exact tail mass. A log's key holds the name under which the model is served; that the name still stands for the
model that began the log is seen by a few answers (probe.py). Tested on replies of the documented form; no server on a GPU was
at hand.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import requests
import torch
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from orchestrator.errors import DataError, EnvironmentFault, SpecError
from orchestrator.labels.answer import Answer
from orchestrator.runtime.environment import vllm_key
from orchestrator.spec.model import VllmServer

TRIES = Retry(total=8, backoff_factor=0.5, status_forcelist=(429, 502, 503, 504), allowed_methods=None, raise_on_status=False)
"""Repeats after 0.5 to 64 seconds; a server that is started again is back by then."""
TIMEOUT_S = 600.0
ANY_ID = 0
"""The id that ends every prompt: a server tells log-probabilities only of places at which an id stands."""
ROUNDING = 1e-3
"""Rounding tolerance: the amount by which probabilities may sum to more than 1."""
BELOW_TOP = 1e-3
"""Nats by which ids that were not named stay below those that were, whatever rounding does."""


class Served(NamedTuple):
    """A model that a server serves."""

    name: str
    root: str
    """The path or hub name that it was loaded from, as the server tells it; its name if the server does not."""

    def is_called(self, path: str) -> bool:
        """Return whether its name or its root ends as `path` does."""
        return Path(path).name in (Path(self.name).name, Path(self.root).name)


def find_served(server: VllmServer) -> Served:
    """Find the model that `server` names, or the first that it serves if it names none.

    Raises `SpecError` for a name that is not served, and `EnvironmentFault` for a server that does not answer.
    """
    return _Client(server.url).find(server.model)


class _Client:
    """A connection to a server, safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.mount(self.url, HTTPAdapter(pool_maxsize=64, max_retries=TRIES))
        key = vllm_key()
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"

    def find(self, name: str | None) -> Served:
        """Find a model as `find_served` does."""
        served = [Served(model["id"], model.get("root") or model["id"]) for model in self.call("GET", "/v1/models")["data"]]
        found = next((model for model in served if name in (None, model.name)), None)
        if found is None:
            names = ", ".join(model.name for model in served)
            raise SpecError(f"teacher.vllm.model: {self.url} serves {names or 'no model'}, not {name}")
        return found

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the parsed reply; raises `SpecError` for a request that the server refuses, else `EnvironmentFault`."""
        try:
            reply = self._session.request(method, self.url + path, json=body, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise EnvironmentFault(f"teacher.vllm.url: {self.url} does not answer ({type(error).__name__})") from error
        if reply.ok:
            return reply.json()
        said = " ".join(reply.text.split())[:160]
        if "max allowed" in said:
            asked = body["prompt_logprobs"]
            raise SpecError(f"labels.k: more than {self.url} tells; start it with --max-logprobs {asked}: {said}")
        fault = SpecError if reply.status_code in (400, 404, 422) else EnvironmentFault
        raise fault(f"teacher.vllm: {self.url} answered {reply.status_code}: {said}")


class VllmBackend:
    """A model that a vLLM server serves; safe to use from one thread, asks for all rows at once."""

    def __init__(self, server: VllmServer, k: int, vocab_size: int) -> None:
        """Connect; raises `SpecError` if the server does not serve what is needed, `EnvironmentFault` if it does not answer."""
        self._client, self._k, self._vocab_size = _Client(server.url), k, vocab_size
        self._url = self._client.url
        self._model = self._client.find(server.model).name
        self._ask([ANY_ID])  # so that a limit shows before the work starts

    def answer(self, ids: torch.Tensor) -> Answer:
        with ThreadPoolExecutor(len(ids)) as threads:
            rows = list(threads.map(self._ask, ids.tolist()))
        return Answer(torch.stack(rows), self._spread, self._vocab_size)

    def target_log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [rows, seq] of `ids[:, 1:]`, each after what stands before it in `ids` [rows, seq + 1]."""
        with ThreadPoolExecutor(len(ids)) as threads:
            rows = list(threads.map(self._ask_targets, ids.tolist()))
        return torch.tensor(rows)

    def _ask(self, ids: list[int]) -> torch.Tensor:
        """Return the k most likely ids after each of `ids`, and their log-probabilities, side by side [seq, 2 k]."""
        return torch.stack([self._top(place) for place in self._places([*ids, ANY_ID], self._k)])

    def _ask_targets(self, ids: list[int]) -> list[float]:
        named = zip(self._places(ids, 1), ids[1:], strict=True)
        return [place[str(target)]["logprob"] if str(target) in place else -math.inf for place, target in named]

    def _places(self, prompt: list[int], k: int) -> list[dict[str, Any]]:
        """Return what the server says of each id of `prompt` but the first, by id: of the `k` likeliest ones and of itself."""
        asked = {"prompt": prompt, "prompt_logprobs": k, "max_tokens": 1, "temperature": 0}
        reply = self._client.call("POST", "/v1/completions", {"model": self._model} | asked)
        places: list[dict[str, Any] | None] = reply["choices"][0].get("prompt_logprobs") or []
        if len(places) != len(prompt):
            raise DataError(f"teacher.vllm: {self._url} said something about {len(places)} of {len(prompt)} places of a row")
        return [place or {} for place in places[1:]]

    def _top(self, place: dict[str, Any]) -> torch.Tensor:
        # The id that stands there is named too, however unlikely it is.
        named = sorted(((entry["logprob"], int(id)) for id, entry in place.items()), reverse=True)[: self._k]
        if len(named) < self._k or any(id >= self._vocab_size for _, id in named):
            ids = "fewer ids" if len(named) < self._k else f"ids beyond the vocabulary of {self._vocab_size}"
            raise DataError(f"teacher.vllm: {self._url} named {ids} where {self._k} were asked for")
        log_probs, top = zip(*named, strict=True)
        if log_probs[0] > ROUNDING or math.fsum(map(math.exp, log_probs)) > 1 + ROUNDING:  # exp of a logit may overflow
            raise DataError(f"teacher.vllm: {self._url} told no log-probabilities (--logprobs-mode); they sum to more than 1")
        return torch.tensor([*top, *log_probs], dtype=torch.float64)

    def _spread(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits [n, vocab] of what the server told [n, 2 k]; the mass that is left over is spread evenly."""
        top, log_probs = states.chunk(2, -1)
        left = (-torch.expm1(log_probs.logsumexp(-1, keepdim=True))).clamp_min(torch.finfo(torch.float64).tiny)
        each = left.log() - math.log(max(1, self._vocab_size - self._k))
        each = torch.minimum(each, log_probs[:, -1:] - BELOW_TOP)
        return each.repeat(1, self._vocab_size).scatter(1, top.long(), log_probs).float()
