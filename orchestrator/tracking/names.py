"""Every metric the system records, once: MLflow, Ray and the dashboards all take the names from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

LOSS = "train/loss"
CE_NATS = "train/ce_nats"
KD_NATS = "train/kd_nats"
FEATURE_LOSS = "train/feature_loss"
MTP_LOSS = "train/mtp_loss"
ROUTER_AUX = "train/router_aux"
EXPERT_IMBALANCE = "train/expert_imbalance"
DROPPED_FRACTION = "train/dropped_fraction"
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"
TRAIN_TOKENS_PER_S = "train/tokens_per_s"
LABEL_WAIT_FRACTION = "train/label_wait_fraction"
INTERVAL_S = "train/interval_s"
SHARDS_COMMITTED = "label/shards_committed"
LABEL_TOKENS_PER_S = "label/tokens_per_s"
BLOCKED_FRACTION = "label/blocked_fraction"
BUSY_S = "label/busy_s"
IDLE_S = "label/idle_s"
BLOCKED_S = "label/blocked_s"
BYTES_PER_TOKEN = "label/bytes_per_token"


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    unit: str
    help: str


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric(LOSS, "nats", "What the optimizer minimises: the objective's mixture, mean per target token"),
            Metric(CE_NATS, "nats", "Cross entropy on the hard targets, mean per target token"),
            Metric(
                KD_NATS,
                "nats",
                "Divergence from the teacher's soft labels (of sampled ones: from the draw), mean per target token",
            ),
            Metric(FEATURE_LOSS, "1", "Weighted sum of the objective's losses on inner layers"),
            Metric(MTP_LOSS, "nats", "Weighted loss of the multi-token-prediction modules, mean over depths and tokens"),
            Metric(ROUTER_AUX, "1", "Load-balancing loss of the routers, mean over layers; 1 when balanced"),
            Metric(EXPERT_IMBALANCE, "1", "Load of the busiest expert over the mean load, in the worst layer"),
            Metric(DROPPED_FRACTION, "1", "Part of the tokens' picks that reached no expert"),
            Metric(LEARNING_RATE, "1", "Learning rate of the step"),
            Metric(GRAD_NORM, "1", "Norm of the whole gradient before clipping"),
            Metric(TRAIN_TOKENS_PER_S, "tokens/s", "Target tokens trained on, all workers together"),
            Metric(LABEL_WAIT_FRACTION, "1", "Part of the time in which the student waited for labels"),
            Metric(INTERVAL_S, "s", "Time that the rates of the same point are about"),
            Metric(SHARDS_COMMITTED, "shards", "Label shards committed so far"),
            Metric(LABEL_TOKENS_PER_S, "tokens/s", "Tokens labelled, all teachers together"),
            Metric(BLOCKED_FRACTION, "1", "Part of the time in which the teachers waited for the student (run-ahead)"),
            Metric(BUSY_S, "s", "Time that teacher replicas have spent labelling, summed over replicas"),
            Metric(IDLE_S, "s", "Time that teacher replicas have waited for the next shard, summed over replicas"),
            Metric(BLOCKED_S, "s", "Time that teacher replicas have waited for the student, summed over replicas"),
            Metric(BYTES_PER_TOKEN, "bytes/token", "Stored bytes of label per token"),
        )
    }
)


def stage_id(stage: str, key: str) -> str:
    """Name of a stage's metric series and MLflow run: another `key` (fingerprint) is another series."""
    return f"{stage}:{key[:8]}"
