"""Every metric the system records, once: MLflow, Ray and the dashboards all take the names from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

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
TRAIN_TOKENS = "train/tokens"
TRAIN_BUSY_S = "train/busy_s"
HELDOUT_CE_NATS = "heldout/ce_nats"
HELDOUT_KL_NATS = "heldout/kl_nats"
SHARDS_STARTED = "train/shards_started"
LAST_CHECKPOINT_TIME_S = "train/last_checkpoint_time_s"
CHECKPOINT_STALL_S = "train/checkpoint_stall_s"
RESTARTS = "train/restarts"
NONFINITE_LOSSES = "train/nonfinite_losses"
SHARDS_COMMITTED = "label/shards_committed"
LABEL_TOKENS_PER_S = "label/tokens_per_s"
BLOCKED_FRACTION = "label/blocked_fraction"
BUSY_S = "label/busy_s"
IDLE_S = "label/idle_s"
BLOCKED_S = "label/blocked_s"
BYTES_PER_TOKEN = "label/bytes_per_token"
TEACHER_REPLICAS = "label/replicas"
LABEL_TOKENS = "label/tokens"
REPLICA_BUSY_S = "label/replica_busy_s"
REPLICA_IDLE_S = "label/replica_idle_s"
REPLICA_BLOCKED_S = "label/replica_blocked_s"
RUNNING = "stage/running"
LAST_PROGRESS_TIME_S = "stage/last_progress_time_s"

Kind = Literal["series", "log", "state", "count"]
"""Meaning of a metric's values, and who receives them.

`series`: how it was at a step. The run's log and MLflow, and Prometheus as a gauge.
`log`: a rate, a share or a sum since some earlier step. Log and MLflow; Prometheus has the counts from which it can be worked
out for any span of time, and which also tell when nothing comes any more.
`state`: how it is now. A gauge.
`count`: how much was added since the last point. A counter; what is done again after a restart counts again.
"""


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    unit: str
    help: str
    kind: Kind = "series"

    @property
    def logged(self) -> bool:
        """Return whether the metric's points go into the run's log and MLflow."""
        return self.kind in ("series", "log")

    @property
    def exported(self) -> bool:
        """Return whether the metric goes to Prometheus."""
        return self.kind != "log"

    @property
    def ray_name(self) -> str:
        """Its name in `ray.util.metrics`."""
        return f"distill_{self.name.replace('/', '_')}"

    @property
    def prometheus_name(self) -> str:
        """Return the name that Ray gives `ray_name` on the way to Prometheus."""
        return f"ray_{self.ray_name}{'_total' if self.kind == 'count' else ''}"


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
            Metric(TRAIN_TOKENS_PER_S, "tokens/s", "Tokens of rows trained on, all workers together", "log"),
            Metric(LABEL_WAIT_FRACTION, "1", "Part of the time in which the student waited for labels", "log"),
            Metric(INTERVAL_S, "s", "Time that the rates of the same point are about", "log"),
            Metric(TRAIN_TOKENS, "tokens", "Tokens of rows trained on, all workers together", "count"),
            Metric(TRAIN_BUSY_S, "s", "Time in which training did not wait for labels", "count"),
            Metric(HELDOUT_CE_NATS, "nats", "Cross entropy on held-out rows while the model trains, mean per target token"),
            Metric(
                HELDOUT_KL_NATS,
                "nats",
                "KL from the teacher on the same rows, over its likeliest ids and all others as one: a lower bound",
            ),
            Metric(SHARDS_STARTED, "shards", "Token shards that training has begun to read", "state"),
            Metric(
                LAST_CHECKPOINT_TIME_S,
                "Unix s",
                "When the last checkpoint was written, or training began: what was done since would be lost",
                "state",
            ),
            Metric(CHECKPOINT_STALL_S, "s", "Time that training stood still for a checkpoint, told when that is durable"),
            Metric(RESTARTS, "restarts", "Restarts after a process of the stage died", "count"),
            Metric(NONFINITE_LOSSES, "steps", "Steps whose loss or gradient was not finite", "count"),
            Metric(SHARDS_COMMITTED, "shards", "Label shards committed so far"),
            Metric(LABEL_TOKENS_PER_S, "tokens/s", "Tokens labelled, all teachers together", "log"),
            Metric(BLOCKED_FRACTION, "1", "Part of the time in which the teachers waited for the student (run-ahead)", "log"),
            Metric(BUSY_S, "s", "Time that teacher replicas have spent labelling, summed over replicas", "log"),
            Metric(IDLE_S, "s", "Time that teacher replicas have waited for the next shard, summed over replicas", "log"),
            Metric(BLOCKED_S, "s", "Time that teacher replicas have waited for the student, summed over replicas", "log"),
            Metric(BYTES_PER_TOKEN, "bytes/token", "Stored bytes of label per token"),
            Metric(LABEL_TOKENS, "tokens", "Tokens labelled, all teachers together", "count"),
            Metric(TEACHER_REPLICAS, "replicas", "Teacher replicas in the pool"),
            Metric(REPLICA_BUSY_S, "s", "Time in which a teacher replica labelled", "count"),
            Metric(REPLICA_IDLE_S, "s", "Time in which a teacher replica waited for the next shard", "count"),
            Metric(REPLICA_BLOCKED_S, "s", "Time in which a teacher replica waited for the student (run-ahead)", "count"),
            Metric(RUNNING, "1", "1 while the stage is at work", "state"),
            Metric(LAST_PROGRESS_TIME_S, "Unix s", "When tokens were last trained on or labelled, or the stage began", "state"),
        )
    }
)


HEADLINES = {
    f"{stage}/{name}"
    for stage, names in {
        "student": (LOSS, CE_NATS, KD_NATS, HELDOUT_CE_NATS, HELDOUT_KL_NATS, TRAIN_TOKENS_PER_S),
        "labels": (LABEL_TOKENS_PER_S,),
    }.items()
    for name in names
}
"""Series, as STAGE/METRIC, that MLflow shows on the parent run too while the run goes on."""


def of_replica(name: str, replica: int) -> str:
    """Name under which a point holds `name` of one teacher `replica` alone."""
    return f"{name}:{replica}"


def metric_of(name: str) -> tuple[Metric, str]:
    """The metric that `name` in a point means, and the replica, which is empty for the stage as a whole."""
    metric, _, replica = name.partition(":")
    return METRICS[metric], replica


def stage_id(stage: str, key: str) -> str:
    """Name of a stage's metric series and MLflow run: another `key` (fingerprint) is another series."""
    return f"{stage}:{key[:8]}"
