"""Inner features of real architectures, kept, stored and compared layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import DataError, IntegrityError, SpecError
from orchestrator.labels.basis import Basis, Moments, bases_of, to_bytes
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Frame
from orchestrator.labels.vectors import Vectors
from orchestrator.losses.inner import InnerLoss, links
from orchestrator.losses.relations import minilm
from orchestrator.models.build import build_model, outline
from orchestrator.models.features import captured, feature_widths, layer_count
from orchestrator.models.head import last_hidden
from orchestrator.spec import labels as spec
from orchestrator.spec.labels import DenseLabels, Feature, Features, kept_features
from orchestrator.spec.model import Model
from orchestrator.spec.objective import Objective
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.teacher.backend import Replica, TransformersBackend
from tests.label_logs import verified

VOCAB, SEQ = 67, 12
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
STUDENT = Model(type="llama", config=SMALL)
TEACHER = Model(type="qwen3", config={**SMALL, "hidden_size": 48, "num_hidden_layers": 4, "head_dim": 16})
KEPT = Features(
    keep=(Feature(layer=2), Feature(layer=4), Feature(layer=4, part="values"), Feature(layer=2, part="ffn")), codec="fp16"
)


def model_of(spec: Model, seed: int) -> Any:
    return build_model(spec, VOCAB, seed, "student").eval()


def ids_of(seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (3, SEQ), generator=torch.Generator().manual_seed(seed))


def terms(*written: dict[str, Any]) -> Any:
    import json

    return Objective.model_validate_json(json.dumps({"features": list(written)})).features


@pytest.mark.parametrize("model", [STUDENT, TEACHER, Model(type="gemma3_text", config={**SMALL, "head_dim": 8})])
def test_features_are_what_the_blocks_put_out(seed: int, model: Model) -> None:
    made, ids = model_of(model, seed), ids_of(seed)
    names = ["hidden.1", "ffn.2", "queries.1", "keys.2", "values.2"]
    with torch.no_grad(), captured(made, names, "x") as found:
        last_hidden(made, ids)
    with torch.no_grad():
        states = made.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(found["hidden.1"], states[1])
    assert {name: value.shape[-1] for name, value in found.items()} == feature_widths(made, names, "x")
    with torch.no_grad():
        last_hidden(made, ids.flip(0))
    assert torch.equal(found["hidden.1"], states[1]), "nothing is kept outside"


def test_shapes_of_a_folder_need_no_weights(seed: int, tmp_path: Path) -> None:
    made = model_of(TEACHER, seed)
    made.save_pretrained(tmp_path)
    shapes = outline(tmp_path)
    assert all(p.is_meta for p in shapes.parameters())
    assert layer_count(shapes) == 4
    assert feature_widths(shapes, ["hidden.3", "values.4"], "x") == feature_widths(made, ["hidden.3", "values.4"], "x")


def test_a_teacher_answers_with_its_features(seed: int, tmp_path: Path) -> None:
    made, ids = model_of(TEACHER, seed), ids_of(seed)
    made.save_pretrained(tmp_path)
    labels = DenseLabels(kind="dense", features=KEPT)
    answer = TransformersBackend(Replica(str(tmp_path), "fp32", kept_features(labels))).answer(ids)
    codec = Codec(labels, Frame(VOCAB, SEQ))
    arrays = codec.unpack(codec.pack(codec.extract(answer, [bytes(16)] * 3)))
    back = codec.features(arrays)
    assert back.keys() == set(kept_features(labels))
    for name, states in back.items():
        assert torch.allclose(states.float(), answer.features[name], rtol=1e-3, atol=1e-3), name
    with pytest.raises(SpecError, match=r"labels\.features: hidden\.5 asked for, but Qwen3ForCausalLM has 4 layers"):
        TransformersBackend(Replica(str(tmp_path), "fp32", ("hidden.5",)))


@pytest.mark.parametrize("codec,bound", [("fp16", 2**-11), ("fp32", 0.0), ("int8", 0.5 / 127)])
def test_vectors_survive_storage(seed: int, codec: Any, bound: float) -> None:
    states = torch.randn(3, SEQ, 40, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 3, SEQ)[:, None]
    vectors = Vectors("x", spec.Vectors(codec=codec), Frame(VOCAB, SEQ))
    arrays = vectors.extract(states)
    back = vectors.tensor(vectors.unpack(vectors.pack(arrays))).float()
    assert ((back - states).abs() <= bound * (states.abs().amax(-1, keepdim=True) + 1e-3)).all()
    assert torch.equal(back, states) == (codec == "fp32")
    for bad in (float("nan"), float("inf"), 1e5 if codec == "fp16" else float("-inf")):
        states[1, 3, 5] = bad
        with pytest.raises(DataError, match="the teacher's x reach"):
            vectors.extract(states)


def moments_of(states: torch.Tensor) -> Moments:
    moments = Moments(states.shape[-1])
    for part in states:
        moments.add(part)
    return moments


def test_coordinates_hold_what_lies_in_their_directions(seed: int, store: LocalStore) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, SEQ, 7, generator=generator) @ torch.randn(7, 40, generator=generator) + 5
    log = LabelLog.open(store, {})
    log.keep("basis", to_bytes({"x": Basis.fit(moments_of(states), 7)}))
    log.keep("basis", to_bytes({"x": Basis.fit(moments_of(states.roll(1, 2)), 7)}))
    vectors = Vectors("x", spec.Vectors(codec="pca", rank=7), Frame(VOCAB, SEQ, bases=bases_of(log)))
    arrays = vectors.extract(states)
    assert arrays["x"].shape == (3, SEQ, 7)
    back = vectors.tensor(vectors.unpack(vectors.pack(arrays)))
    assert torch.allclose(back, states, rtol=1e-2, atol=2e-2), "the first basis stays"
    fewer = Basis.fit(moments_of(states), 3)
    _, singular, _ = torch.linalg.svd(states.flatten(0, 1).double() - states.flatten(0, 1).double().mean(0))
    lost = (fewer.restore(fewer.project(states)) - states).square().sum()
    assert float(lost) == pytest.approx(float(singular[3:].square().sum()), rel=1e-3), "no basis of three loses less"
    with pytest.raises(SpecError, match="rank 41 exceeds"):
        Basis.fit(moments_of(states.repeat(2, 1, 1)), 41)
    file = store.path(log.folder) / store.read_json(f"{log.folder}/basis.json")["file"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    for reader in (lambda: log.kept("basis"), lambda: verified(log)):
        with pytest.raises(IntegrityError, match="sha256 mismatch"):
            reader()
    file.unlink()
    with pytest.raises(IntegrityError, match="is gone"):
        log.kept("basis")


def test_terms_add_up_over_their_layer_pairs(seed: int) -> None:
    student, teacher, ids = model_of(STUDENT, seed), model_of(TEACHER, seed + 1), ids_of(seed)
    asked = terms(
        {"kind": "minilm", "weight": 2.0, "heads": 4, "layers": [[1, 2], [2, 4]]},
        {"kind": "cosine", "weight": 0.5, "layers": "uniform"},
        {"kind": "clone", "weight": 1.0, "layers": [[2, 2]]},
        {"kind": "gram", "weight": 1.0, "points": 5},
    )
    linked = links(asked, 2, 4)
    assert [(link.student, link.teacher) for link in linked] == [
        ("values.1", "values.2"),
        ("values.2", "values.4"),
        ("hidden.1", "hidden.2"),
        ("hidden.2", "hidden.4"),
        ("ffn.2", "ffn.2"),
        ("hidden.2", "hidden.4"),
    ]
    names = [{link.student for link in linked}, {link.teacher for link in linked}]
    inner = InnerLoss(linked, feature_widths(student, names[0], "x"), feature_widths(teacher, names[1], "x"), seed)
    assert sum(p.numel() for p in inner.parameters()) == 2 * 32 * 48 + 48 * 32, "two maps to the teacher's width, one back"
    assert sum(p.numel() for p in inner.parameters() if p.requires_grad) == 2 * 32 * 48, "what could shrink to zero is fixed"
    with captured(student, names[0], "x") as ours:
        last_hidden(student, ids)
    with torch.no_grad(), captured(teacher, names[1], "x") as theirs:
        last_hidden(teacher, ids)
    whole = inner(theirs, ours)

    alone = [
        InnerLoss(
            links((term,), 2, 4), *[feature_widths(m, n, "x") for m, n in ((student, names[0]), (teacher, names[1]))], seed
        )
        for term in asked
    ]
    pairs = [minilm(theirs["values.2"], ours["values.1"], 4).mean(), minilm(theirs["values.4"], ours["values.2"], 4).mean()]
    assert float(alone[0](theirs, ours).detach()) == pytest.approx(float(sum(pairs).detach()), rel=1e-5), (
        "weight 2, the mean of two pairs"
    )
    whole.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in inner.parameters() if p.requires_grad)
    touched = [p for p in student.base_model.layers[1].parameters() if p.grad is not None]
    assert touched, "the student learns from it"
    rolled = {name: states.roll(1, 1) for name, states in theirs.items()}
    assert float(inner(rolled, ours).detach()) != pytest.approx(float(whole.detach()), rel=1e-3), (
        "features of the position before are noticed"
    )


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(SpecError, match=r"teacher layer 9 of pair \(1, 9\) is not in 1\.\.4"):
        links(terms({"kind": "mse", "weight": 1.0, "layers": [[1, 9]]}), 2, 4)
    with pytest.raises(SpecError, match="width 32 cannot be cut into 5 equal heads"):
        minilm(torch.zeros(1, 3, 32), torch.zeros(1, 3, 32), 5)
