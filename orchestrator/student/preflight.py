"""Checks of a training before anything costs time: whether the model can be built, and whether the strategy fits it."""

from __future__ import annotations

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.models.build import model_config, outline
from orchestrator.models.features import feature_widths
from orchestrator.models.fp8 import MIN_BLOCKS
from orchestrator.models.hub import checkpoint_folder
from orchestrator.models.prune import check_prunable, pruned_config
from orchestrator.models.sharded import check_shards
from orchestrator.models.upcycle import mixture_config
from orchestrator.plan.checkpoint import check_positions, local_checkpoint
from orchestrator.spec.job import Job
from orchestrator.spec.labels import kept_features
from orchestrator.spec.model import ConfigStudent, PretrainTeacher, PrunedStudent, TransformersTeacher, UpcycledStudent
from orchestrator.spec.train import Expert, Pipeline, Train

FAMILIES = ("deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe")
"""Model types whose routing stays what it is under AutoEP. Of others it would make something else without a word (glm4_moe).

One difference: under bf16 the router of deepseek_v3 computes its logits in bf16, in transformers in fp32."""


def check_models(job: Job, ids: int) -> None:
    """Raise `SpecError` for a model that transformers would not build or that its `train` section cannot train.

    `ids` is the size of the vocabulary, or stands in for it. A teacher that is not here yet is not looked at, nor a student
    pruned from it.
    """
    teacher = _teacher_outline(job, ids)
    if teacher is not None:
        if isinstance(job.teacher, PretrainTeacher):
            check_strategy(teacher.config, job.teacher.train, "teacher.train")
        if job.teacher.shards > 1:
            check_shards(teacher, job.teacher.shards)
        feature_widths(teacher, kept_features(job.labels), "labels.features")
    student = _student_config(job, ids, teacher)
    if student is not None:
        check_positions(student.model_type, student.to_dict(), job.data.seq_len, "student")
        check_strategy(student, job.train, "train")


def check_strategy(config: PreTrainedConfig, train: Train, section: str) -> None:
    """Raise `SpecError` naming `section` if a model of `config` cannot be trained as `train` asks."""
    layers, parallel = config.get_text_config().num_hidden_layers, train.parallel
    if isinstance(parallel, Pipeline) and layers < parallel.parts:
        raise SpecError(
            f"{section}.parallel.stages: {parallel.schedule} over {parallel.stages} stages cuts the model in {parallel.parts}, "
            f"but it has {layers} layers"
        )
    if isinstance(parallel, Expert) and config.model_type not in FAMILIES:
        raise SpecError(
            f"{section}.parallel.kind: 'expert' cannot train models of type {config.model_type!r}, only {', '.join(FAMILIES)}"
        )
    if train.precision == "fp8" and layers < MIN_BLOCKS:
        raise SpecError(
            f"{section}.precision: fp8 leaves the first and the last block in bf16, and the model has {layers} in all; "
            f"give it {MIN_BLOCKS} or more, or use bf16"
        )


def _teacher_outline(job: Job, ids: int) -> PreTrainedModel | None:
    """The teacher without weights."""
    if isinstance(job.teacher, PretrainTeacher):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config(job.teacher.model, ids, "teacher"))
    folder = local_checkpoint(job.teacher.path) if isinstance(job.teacher, TransformersTeacher) else None
    if folder is None:
        return None
    try:
        return outline(folder)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SpecError(f"teacher.path: {folder}/config.json: {str(error).splitlines()[0]}") from error


def _student_config(job: Job, ids: int, teacher: PreTrainedModel | None) -> PreTrainedConfig | None:
    student = job.student
    if isinstance(student, ConfigStudent):
        return model_config(student.model, ids, "student")
    if isinstance(student, PrunedStudent):
        if teacher is None:
            return None
        check_prunable(teacher, student, "student")
        return pruned_config(teacher, student, "student")
    folder = checkpoint_folder(student.path, student.revision, "student.path")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SpecError(f"student.path: {folder}/config.json: {str(error).splitlines()[0]}") from error
    if isinstance(student, UpcycledStudent):
        return mixture_config(config, student.experts, student.experts_per_token, "student")
    return config
