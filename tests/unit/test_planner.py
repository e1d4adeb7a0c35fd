"""The planner's figures against models that are built, against formulas written out, and against what papers report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.plan.cluster import DEVICES, Calibration, Cluster, assumed_calibration, parse_cluster
from orchestrator.plan.estimate import Workload, advice, balanced, estimate, nearby, rebatched, teacher_bytes
from orchestrator.plan.footprint import Rows, footprint
from orchestrator.plan.layout import Layout, bubble, shares
from orchestrator.plan.speed import forward_flops, traffic, training_flops, training_speed
from tests.unit.test_sizes import MLA, SHAPE, known

H800 = parse_cluster("256x8xH800")

# Who holds what.

SMALL = known("llama", SHAPE | {"num_hidden_layers": 7}, 101)
ROUTED = known("mixtral", SHAPE | {"num_hidden_layers": 6, "num_local_experts": 8}, 101)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("expert", [1, 2])
def test_the_workers_of_a_pipeline_hold_the_model_between_them(schedule: Any, stages: int, expert: int) -> None:
    for model in (SMALL, ROUTED):
        held = shares(model, Layout(data=2, pipeline=stages, expert=expert, schedule=schedule), 16)
        assert len(held) == stages
        assert sum(share.shared + expert * share.experts for share in held) == model.total
        blocks = [len(share.blocks) for share in held]
        assert sum(blocks) == len(model.blocks)
        assert max(blocks) - min(blocks) <= 2, "the last norm counts as a block"
        assert sum(share.head for share in held) == model.vocab * model.width


def test_a_pipeline_is_cut_as_deepspeed_cuts_it() -> None:
    """What `partition_balanced` of DeepSpeed 0.19.8 makes of seven blocks and the last norm, the norm not counted here."""
    for stages, expected in ((3, [3, 3, 1]), (4, [2, 2, 2, 1]), (6, [2, 2, 1, 1, 1, 0])):
        assert [len(share.blocks) for share in shares(SMALL, Layout(pipeline=stages), 8)] == expected


def test_a_tied_matrix_lies_on_both_ends_of_a_pipeline() -> None:
    tied = known("llama", SHAPE | {"tie_word_embeddings": True}, 101)
    assert sum(s.total for s in shares(tied, Layout(pipeline=3), 4)) == tied.total + tied.embedding
    assert sum(s.total for s in shares(tied, Layout(pipeline=3, schedule="dualpipev"), 8)) == tied.total, "one worker has both"


def test_micro_batches_in_flight() -> None:
    one = [share.in_flight for share in shares(SMALL, Layout(pipeline=4), 16)]
    assert one == [4, 3, 2, 1]
    assert [share.in_flight for share in shares(SMALL, Layout(pipeline=4), 2)] == [2, 2, 2, 1]
    both = shares(SMALL, Layout(pipeline=4, schedule="dualpipev"), 16)
    assert [share.in_flight for share in both] == [4.5] * 4, "nine halves"


def simulated_1f1b(stages: int, micro_batches: int) -> float:
    """Idle share of a pipeline whose way out takes 1 and whose way back takes 2, event by event."""
    done: dict[tuple[str, int, int], float] = {}
    plans = []
    for stage in range(stages):
        warm = min(micro_batches, stages - 1 - stage)
        order = [("out", m) for m in range(warm)]
        for m in range(micro_batches - warm):
            order += [("out", m + warm), ("back", m)]
        plans.append(order + [("back", m) for m in range(micro_batches - warm, micro_batches)])
    free = [0.0] * stages
    while any(plans):
        for stage, plan in enumerate(plans):
            if not plan:
                continue
            way, m = plan[0]
            before = (way, stage - 1, m) if way == "out" else (way, stage + 1, m)
            at_end = before[1] in (-1, stages)
            if at_end and way == "back":
                before = ("out", stage, m)
                at_end = False
            if not at_end and before not in done:
                continue
            start = max(free[stage], 0.0 if at_end else done[before])
            free[stage] = done[(way, stage, m)] = start + (1 if way == "out" else 2)
            plan.pop(0)
    return 1 - 3 * micro_batches / max(free)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 2), (4, 8), (4, 4), (8, 32)])
def test_the_bubble_of_1f1b_is_that_of_a_simulated_one(stages: int, micro_batches: int) -> None:
    assert bubble(Layout(pipeline=stages), micro_batches) == pytest.approx(simulated_1f1b(stages, micro_batches))


def test_the_bubble_of_dualpipev() -> None:
    """(p-1)(F+2B) - F beside 2m(F+B), with F = 1, B = 2."""
    idle, busy = 3 * (1 + 2 * 2) - 1, 2 * 10 * (1 + 2)
    assert bubble(Layout(pipeline=4, schedule="dualpipev"), 10) == pytest.approx(idle / (idle + busy))
    assert bubble(Layout(schedule="dualpipev"), 10) == 0


# Memory.

EIGHT_B = known("llama", {"intermediate_size": 14336, "num_key_value_heads": 8}, 128256)
ROWS = Rows(1, 4, 4096)


@pytest.mark.parametrize(("stage", "per_parameter"), [(1, 2 + 4 + 12 / 8), (2, 2 + 4 / 8 + 12 / 8), (3, (2 + 4 + 12) / 8)])
def test_model_states_by_zero_stage(stage: Any, per_parameter: float) -> None:
    """Rajbhandari et al. 2020: 16 bytes a parameter in mixed precision, 18 with gradients in fp32."""
    found = footprint(EIGHT_B, Layout(8, zero_stage=stage), ROWS, on_gpu=True)
    assert found.weights + found.gradients + found.optimizer == pytest.approx(per_parameter * EIGHT_B.total, rel=1e-6)
    offloaded = footprint(EIGHT_B, Layout(8, zero_stage=stage, offload="cpu"), ROWS, on_gpu=True)
    assert offloaded.gradients == offloaded.optimizer == 0
    assert offloaded.host > found.gradients + found.optimizer
    assert offloaded.total < found.total


def test_experts_are_spread_and_the_rest_is_not() -> None:
    whole = footprint(ROUTED, Layout(4), Rows(1, 1, 8), on_gpu=True)
    spread = footprint(ROUTED, Layout(4, expert=4), Rows(1, 1, 8), on_gpu=True)
    assert whole.weights - spread.weights == 2 * ROUTED.experts * 3 // 4
    assert spread.optimizer == whole.optimizer, "each expert's states lie on one worker either way"


def saved_bytes(kind: str, config: dict[str, Any], dtype: str) -> float:
    """What autograd keeps per token and block: of two blocks less one block, tensors counted once each, weights not at all."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def kept(layers: int) -> int:
        built: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**config, "num_hidden_layers": layers}))
        built.to(getattr(torch, dtype))
        weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
        found: dict[int, int] = {}
        alive: list[Any] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = built.model(torch.randint(64, (2, SEQ)), use_cache=False).last_hidden_state
        del output
        return sum(found.values())

    return (kept(2) - kept(1)) / (2 * SEQ)


SEQ = 64
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma3_text": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 16}),
    "mixtral": ("mixtral", {"num_key_value_heads": 4, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {"num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", {**MLA, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "first_k_dense_replace": 0}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_autograd_keeps(name: str, dtype: str) -> None:
    from orchestrator.plan.footprint import block_bytes

    kind, config = ACTIVATIONS[name]
    config = {**SHAPE, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 64, **config}
    if kind in ("qwen3_moe", "deepseek_v3"):
        config |= {"moe_intermediate_size": 40, "num_experts_per_tok": 2}
    model = known(kind, config)
    expected = block_bytes(model, model.blocks[-1], 2 if dtype == "bfloat16" else 4, SEQ, on_gpu=False)
    found = saved_bytes(kind, config, dtype)
    print(f"{name} {dtype}: {found:.0f} kept, {expected:.0f} in the plan")
    assert expected == pytest.approx(found, rel=0.15)


def test_checkpointing_keeps_what_enters_a_block_and_one_block() -> None:
    plain = footprint(EIGHT_B, Layout(8), ROWS, on_gpu=True)
    lean = footprint(EIGHT_B, Layout(8, checkpointing=True), ROWS, on_gpu=True)
    entering = 2 * EIGHT_B.width * ROWS.micro_tokens * len(EIGHT_B.blocks)
    assert entering < lean.activations < entering + 1.3 * plain.activations / len(EIGHT_B.blocks)


# Clusters, traffic, time.


@pytest.mark.parametrize(
    ("text", "name", "devices", "nodes"),
    [("128xH100", "H100", 128, 16), ("16x8xh100", "H100", 128, 16), ("3xL4", "L4", 3, 1), ("2x4xA100", "A100-80", 8, 2)],
)
def test_clusters(text: str, name: str, devices: int, nodes: int) -> None:
    cluster = parse_cluster(text)
    assert (cluster.device.name, cluster.devices, cluster.nodes) == (name, devices, nodes)


@pytest.mark.parametrize("text", ["H100", "x8xH100", "8xH900", "0xH100", "4x4x4xH100", "-1xH100", "8 H100", ""])
def test_a_cluster_that_is_none_is_the_fault_of_who_wrote_it(text: str) -> None:
    with pytest.raises(SpecError, match=r"^cluster: "):
        parse_cluster(text)


@pytest.mark.parametrize(("stage", "times"), [(1, (4 + 2) / 2), (2, 2), (3, 3)])
def test_traffic_of_zero(stage: Any, times: float) -> None:
    """Twice the parameters, thrice under stage 3 (Rajbhandari et al. 2020), less what stays; stage 1 sums in fp32."""
    sent = traffic(EIGHT_B, Layout(8, zero_stage=stage), Rows(1, 1, 4096))
    assert sent.zero == pytest.approx(times * 2 * EIGHT_B.total * 7 / 8)
    assert sent.pipeline == sent.experts == 0
    assert traffic(EIGHT_B, Layout(1, zero_stage=stage), Rows(1, 1, 4096)).total == 0


def test_traffic_of_pipelines_and_experts() -> None:
    rows = Rows(2, 3, 8)
    sent = traffic(ROUTED, Layout(4, pipeline=2, expert=2), rows)
    hidden = 2 * ROUTED.width * rows.tokens
    assert sent.pipeline == 2 * hidden, "states on the way out, their gradients on the way back"
    assert sent.experts == 4 * hidden * 2 * 4 * 1 / 2, "there and back, twice; 2 experts in each of 4 blocks, half of them away"
    both_ways = traffic(ROUTED, Layout(4, pipeline=2, schedule="dualpipev"), rows)
    assert both_ways.pipeline == 4 * hidden


def test_flops_per_token() -> None:
    """6N and 2N, N without the embedding's look-up, beside attention (Kaplan et al. 2020)."""
    multiplied = EIGHT_B.total - EIGHT_B.embedding - 65 * EIGHT_B.width
    attention = 32 * 2 * 4096 * 4096  # blocks, products, heads x head size, half of 2 x seq
    assert forward_flops(EIGHT_B, 4096) == 2 * multiplied + attention
    assert training_flops(EIGHT_B, 4096) == 3 * forward_flops(EIGHT_B, 4096)
    blocks = forward_flops(EIGHT_B, 4096) - 2 * EIGHT_B.head
    assert training_flops(EIGHT_B, 4096, checkpointing=True) == 3 * forward_flops(EIGHT_B, 4096) + blocks
    tied = known("llama", {"intermediate_size": 14336, "num_key_value_heads": 8, "tie_word_embeddings": True}, 128256)
    assert forward_flops(tied, 4096) == forward_flops(EIGHT_B, 4096)


def test_the_time_of_a_step() -> None:
    cluster, calibration = Cluster(DEVICES["H100"], 8, 8), Calibration(4e14, 4e14, update_bytes_per_s=1e12)
    layout = Layout(2, pipeline=4)
    speed = training_speed(EIGHT_B, layout, ROWS, cluster, calibration)
    passes = ROWS.tokens * training_flops(EIGHT_B, 4096) / 4 / 4e14
    assert speed.compute_s == pytest.approx(passes)
    assert speed.bubble == pytest.approx(3 / 7)
    assert speed.communication_s == pytest.approx((speed.traffic.zero + speed.traffic.pipeline) / 450e9)
    assert speed.step_s == pytest.approx(passes * 7 / 4 + speed.communication_s + speed.update_s)
    assert speed.tokens_per_s == pytest.approx(2 * ROWS.tokens / speed.step_s)
    hidden = training_speed(EIGHT_B, replace(layout, schedule="dualpipev"), Rows(1, 8, 4096), cluster, calibration)
    assert hidden.communication_s == pytest.approx(hidden.traffic.zero / 450e9)


# DeepSeek-V3, as its paper describes it.


def test_the_utilisation_that_deepseek_v3_has_reached() -> None:
    """2.664M H800 hours for 14.8T tokens of 4K windows (arXiv:2412.19437, table 1), in our FLOPs: 39 % of the bf16 peak."""
    model = known("deepseek_v3", {})
    bf16, fp8 = (H800.device.peak(precision) for precision in ("bf16", "fp8"))
    sustained = training_flops(model, 4096) * 14.8e12 / (2.664e6 * 3600)
    assert sustained / bf16 == pytest.approx(0.391, abs=0.001)
    assert sustained / fp8 == pytest.approx(0.195, abs=0.001)


def test_deepseek_v3_on_2048_h800() -> None:
    """16 pipeline stages, experts over 64, ZeRO-1, batch 15,360: the paper reports 3.7 days for a trillion tokens."""
    model = known("deepseek_v3", {})
    layout = Layout(128, 16, 64, zero_stage=1, schedule="dualpipev", precision="fp8")
    work = Workload(model, model, 4096, 1, 15360, 16_000, 40)
    planned = estimate(work, layout, H800, assumed_calibration(H800.device, "fp8", "bf16"))
    days = 1e12 / planned.speed.tokens_per_s / 86400
    print(f"{days:.2f} days a trillion tokens, bubble {planned.speed.bubble:.3f}, {planned.memory.total / 1e9:.0f} GB a worker")
    assert days == pytest.approx(3.7, rel=0.1)
    states = planned.memory.weights + planned.memory.gradients + planned.memory.optimizer
    assert states < 0.95 * 80e9
    assert planned.fits is False, "all activations kept in bf16 have no room; the paper recomputes and stores them in fp8"
    lean = estimate(work, replace(layout, checkpointing=True), H800, assumed_calibration(H800.device, "fp8", "bf16"))
    assert lean.fits


# Teacher and student on one cluster.

TEACHER = known(
    "llama",
    {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    128256,
)
WORK = Workload(EIGHT_B, TEACHER, 4096, 4, 512, 1000, 50)
H100 = parse_cluster("128xH100")
RATES = assumed_calibration(H100.device, "bf16", "bf16")
LEAN = Layout(zero_stage=3, checkpointing=True)


def test_the_split_keeps_both_sides_busy() -> None:
    split = balanced(WORK, LEAN, H100, RATES, price_per_hour=2.0)
    student = split.student
    assert split.teacher_tokens_per_s >= student.speed.tokens_per_s == split.tokens_per_s
    teaching = split.teacher_replicas * split.devices_a_replica
    assert teaching + student.layout.workers + split.idle_devices == 128
    assert split.idle_devices >= 0
    assert split.devices_a_replica == 4, "141 GB of weights do not fit two devices"
    less = (split.teacher_replicas - 1) * split.teacher_tokens_per_s / split.teacher_replicas
    assert less < student.speed.tokens_per_s, "no replica too many"
    assert split.hours == pytest.approx(WORK.tokens / split.tokens_per_s / 3600)
    assert split.cost == pytest.approx(2.0 * split.used_devices * split.hours), "what is idle is not billed"
    assert split.label_bytes == 50 * WORK.tokens
    assert balanced(WORK, LEAN, H100, RATES).cost is None


def test_another_batch_uses_what_is_idle() -> None:
    """`plan --cluster 128xH100` left 37 devices idle, because 512 rows divide among few numbers of workers."""
    split, more = (plan(WORK, LEAN, H100, RATES) for plan in (balanced, rebatched))
    assert more.idle_devices < split.idle_devices and more.tokens_per_s > split.tokens_per_s
    assert split.global_rows == 512 < more.global_rows < 1024
    again = balanced(replace(WORK, global_rows=more.global_rows), LEAN, H100, RATES)
    assert (again.used_devices, again.student.layout) == (more.used_devices, more.student.layout), "the batch is all it takes"


def test_a_small_cluster_has_a_student_that_waits_or_no_room_at_all() -> None:
    waiting = balanced(WORK, LEAN, parse_cluster("8xH100"), RATES)
    assert waiting.student.layout.data + 4 * waiting.teacher_replicas <= 8
    with pytest.raises(SpecError, match="no room for a teacher on 4"):
        balanced(WORK, LEAN, parse_cluster("4xH100"), RATES)
    with pytest.raises(SpecError, match="cannot hold the teacher"):
        balanced(WORK, LEAN, parse_cluster("2xL4"), RATES)


def test_the_weights_of_a_teacher_are_spread() -> None:
    four, eight = (teacher_bytes(WORK, devices, on_gpu=True) for devices in (4, 8))
    assert four - eight == pytest.approx(2 * TEACHER.total / 8, rel=1e-6)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(SpecError, match=r"train\.global_batch: 512 rows"):
        estimate(WORK, Layout(3), H100, RATES)
    assert WORK.rows(Layout(512)) == Rows(1, 1, 4096), "a micro-batch is at most a worker's share"


def test_advice_names_what_fits() -> None:
    lines = advice(WORK, Layout(8, zero_stage=1), H100)
    assert "zero stage 1 needs" in lines[0]
    assert len(lines) > 1
    rows = WORK.rows(Layout(8))
    assert rows is not None
    by_name = {str(other): footprint(EIGHT_B, other, rows, on_gpu=True).total for other in nearby(Layout(8))}
    for line in lines[1:]:
        name = line.removeprefix("fits: ").split(":")[0]
        assert by_name[name] <= 0.95 * 80e9
    assert advice(WORK, replace(LEAN, data=64), H100) == []
    assert advice(WORK, Layout(8), parse_cluster("8xCPU")) == [], "a core's memory is not known"


def test_advice_when_nothing_fits() -> None:
    lines = advice(replace(WORK, student=TEACHER), Layout(8), parse_cluster("8xL4"))
    assert len(lines) == 2
    assert lines[1].startswith("least of all: ")
