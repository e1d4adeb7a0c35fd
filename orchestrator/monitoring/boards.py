"""The dashboards: is a run well and who holds it up, does it learn, how does labelling go, what does the cluster carry."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.monitoring import promql
from orchestrator.monitoring.grafana import Dashboard, Panel, Query, Row, Variable
from orchestrator.monitoring.promql import STUDENT, THIS_RUN, latest, of, rate, since
from orchestrator.monitoring.rules import NO_PROGRESS_S, STALE_CHECKPOINT_S, WAITS
from orchestrator.tracking import names
from orchestrator.tracking.names import METRICS

RUN = Variable("run", "Run", METRICS[names.RUNNING].prometheus_name, "run")
SESSION = Variable("session", "Ray session", "ray_node_cpu_count", "SessionName")
WINDOW = "$__rate_interval"
BY_STAGE = "run, stage"
STAGE = "{{run}} {{stage}}"

NO_DEATH = "no process has died"
NO_CHECKPOINT = "training ends before train.checkpoint_every steps"
NO_EVALUATION = "evaluate.every is null"
MOE_ONLY = "the student is no mixture of experts"


def _gauge(name: str, title: str, unit: str, *, log_scale: bool = False, width: int = 8, optional: str | None = None) -> Panel:
    """A gauge of the registry, by stage, in the registry's words."""
    query = Query(latest(name, THIS_RUN, by=BY_STAGE), STAGE)
    return Panel(title, f"{METRICS[name].help}.", [query], unit, log_scale=log_scale, width=width, optional=optional)


def _total(name: str, title: str, thresholds: Sequence[tuple[float, str]], optional: str) -> Panel:
    """Return a panel with the current value of a counter of the registry, by stage."""
    query = Query(f"sum by ({BY_STAGE}) ({of(name, THIS_RUN)})", STAGE)
    return Panel(
        title, f"{METRICS[name].help}.", [query], "short", kind="stat", thresholds=thresholds, width=4, optional=optional
    )


WAITING = Panel(
    "Who waits",
    "Part of the time in which the student waited for labels, and in which the teachers waited for the student because "
    "labels.run_ahead let them go no further. One of them near 0 and the other well above: the one near 0 is the bottleneck.",
    [
        Query(promql.student_wait(WINDOW, THIS_RUN), "{{run}} student waits"),
        Query(promql.teacher_blocked(WINDOW, THIS_RUN), "{{run}} teachers blocked"),
    ],
    "percentunit",
    thresholds=[(WAITS, "orange")],
)
BOTTLENECK = Panel(
    "Bottleneck",
    "The side that the other one waits for, over the last minutes.",
    [
        Query(
            f"2 * (({promql.student_wait('5m', THIS_RUN)}) > bool 0.1)"
            f" + on (run) ((({promql.teacher_blocked('5m', THIS_RUN)}) > bool 0.1)"
            f" or on (run) 0 * {latest(names.RUNNING, STUDENT, THIS_RUN)})",
            "{{run}}",
        )
    ],
    "none",
    kind="stat",
    texts=[
        (0, "neither waits", "green"),
        (1, "the student", "blue"),
        (2, "the teacher", "orange"),
        (3, "each in turn", "yellow"),
    ],
)
TOKENS = Panel(
    "Tokens per second",
    "Tokens labelled by all teachers together, and tokens trained on by all workers of a stage together.",
    [
        Query(rate(names.LABEL_TOKENS, WINDOW, THIS_RUN), "{{run}} labelled"),
        Query(rate(names.TRAIN_TOKENS, WINDOW, THIS_RUN, by=BY_STAGE), f"{STAGE} trained"),
    ],
    "short",
)
RUN_AHEAD = Panel(
    "Run-ahead",
    "Label shards committed that the student has not begun to read. At 0 it waits for the next one; at labels.run_ahead the "
    "teachers wait for it.",
    [Query(promql.run_ahead(THIS_RUN), "{{run}}")],
    "short",
)
LOSS = _gauge(names.LOSS, "Loss", "short")
CHECKPOINT_AGE = Panel(
    "Unsaved work",
    "Time since the last checkpoint, or since training began: what a crash would cost.",
    [Query(since(names.LAST_CHECKPOINT_TIME_S, THIS_RUN, by=BY_STAGE), STAGE)],
    "s",
    kind="stat",
    thresholds=[(STALE_CHECKPOINT_S / 2, "yellow"), (STALE_CHECKPOINT_S, "red")],
    width=4,
)
RESTARTS = _total(names.RESTARTS, "Restarts", [(1, "yellow"), (3, "red")], NO_DEATH)
NONFINITE = _total(names.NONFINITE_LOSSES, "Non-finite losses", [(1, "red")], "every loss was finite")
WORKER_DEATHS = Panel(
    "Processes that died",
    "Unexpected ends of Ray's worker processes per minute, teacher actors and training workers among them.",
    [
        Query("sum by (Type, Name) (rate(ray_node_manager_unexpected_worker_failure_total[5m])) * 60", "{{Type}} {{Name}}"),
    ],
    "short",
    optional=NO_DEATH,
)

OVERVIEW = Dashboard(
    "distill-overview",
    "Distill / Overview",
    "Is the run well, and which side holds it up?",
    RUN,
    [
        Row(
            "Is it well?",
            [
                Panel(
                    "At work",
                    "Stages that are at work.",
                    [Query(latest(names.RUNNING, THIS_RUN, by=BY_STAGE), STAGE)],
                    "none",
                    kind="stat",
                    texts=[(1, "at work", "green")],
                    width=8,
                ),
                Panel(
                    "Since last progress",
                    "Time since tokens were last trained on or labelled.",
                    [Query(since(names.LAST_PROGRESS_TIME_S, promql.AT_WORK, THIS_RUN), "{{run}}")],
                    "s",
                    kind="stat",
                    thresholds=[(NO_PROGRESS_S / 3, "yellow"), (NO_PROGRESS_S, "red")],
                    width=4,
                ),
                CHECKPOINT_AGE,
                RESTARTS,
                NONFINITE,
            ],
        ),
        Row("Which side holds it up?", [BOTTLENECK, WAITING, RUN_AHEAD]),
        Row("What has it come to?", [TOKENS, LOSS, _gauge(names.SHARDS_COMMITTED, "Label shards", "short")]),
    ],
)

TRAINING = Dashboard(
    "distill-training",
    "Distill / Training",
    "Does the student learn? The teacher's own training and the baseline are stages beside it.",
    RUN,
    [
        Row(
            "Loss and its terms",
            [
                LOSS,
                _gauge(names.CE_NATS, "Cross entropy on hard targets", "short"),
                _gauge(names.KD_NATS, "Divergence from the teacher (KL or as configured)", "short"),
                _gauge(
                    names.FEATURE_LOSS, "Loss on inner layers", "short", width=12, optional="objective.features has no entry"
                ),
                _gauge(
                    names.MTP_LOSS, "Loss of predictions further ahead", "short", width=12, optional="student.mtp_depth is 0"
                ),
            ],
        ),
        Row(
            "Held-out text",
            [
                _gauge(names.HELDOUT_CE_NATS, "Held-out cross entropy", "short", width=12, optional=NO_EVALUATION),
                _gauge(names.HELDOUT_KL_NATS, "Held-out KL from the teacher", "short", width=12, optional=NO_EVALUATION),
            ],
        ),
        Row(
            "Optimizer",
            [
                _gauge(names.GRAD_NORM, "Gradient norm", "short", log_scale=True),
                _gauge(names.LEARNING_RATE, "Learning rate", "sci"),
                Panel(
                    "Tokens per second",
                    f"{METRICS[names.TRAIN_TOKENS].help}.",
                    [Query(rate(names.TRAIN_TOKENS, WINDOW, THIS_RUN, by=BY_STAGE), STAGE)],
                    "short",
                ),
            ],
        ),
        Row(
            "Experts",
            [
                _gauge(names.EXPERT_IMBALANCE, "Busiest expert over mean", "short", optional=MOE_ONLY),
                _gauge(names.ROUTER_AUX, "Balance loss", "short", optional=MOE_ONLY),
                _gauge(names.DROPPED_FRACTION, "Dropped picks", "percentunit", optional=MOE_ONLY),
            ],
        ),
        Row(
            "Safety",
            [
                CHECKPOINT_AGE,
                RESTARTS,
                NONFINITE,
                _gauge(names.CHECKPOINT_STALL_S, "Checkpoint stall", "s", width=6, optional=NO_CHECKPOINT),
                Panel(
                    "Worker busy",
                    f"{METRICS[names.TRAIN_BUSY_S].help}, per second.",
                    [Query(rate(names.TRAIN_BUSY_S, WINDOW, THIS_RUN, by=BY_STAGE), STAGE)],
                    "percentunit",
                    width=6,
                ),
            ],
        ),
    ],
)

LABELLING = Dashboard(
    "distill-labelling",
    "Distill / Labelling",
    "How fast does the teacher pool label, what does a token cost, and does the pool wait?",
    RUN,
    [
        Row(
            "Speed and size",
            [
                Panel(
                    "Tokens labelled per second",
                    f"{METRICS[names.LABEL_TOKENS].help}.",
                    [Query(rate(names.LABEL_TOKENS, WINDOW, THIS_RUN), "{{run}}")],
                    "short",
                ),
                Panel(
                    "Label bytes per token",
                    f"{METRICS[names.BYTES_PER_TOKEN].help}.",
                    [Query(latest(names.BYTES_PER_TOKEN, THIS_RUN), "{{run}}")],
                    "decbytes",
                ),
                Panel(
                    "Shards",
                    "Label shards committed, and token shards that the student has begun to read.",
                    [
                        Query(latest(names.SHARDS_COMMITTED, THIS_RUN), "{{run}} committed"),
                        Query(latest(names.SHARDS_STARTED, STUDENT, THIS_RUN), "{{run}} read by the student"),
                    ],
                    "short",
                ),
            ],
        ),
        Row(
            "The pool",
            [
                Panel(
                    "What the teachers do",
                    "How many of them label, wait for the next shard, or wait for the student, on average.",
                    [
                        Query(rate(names.REPLICA_BUSY_S, WINDOW, THIS_RUN), "{{run}} label"),
                        Query(rate(names.REPLICA_IDLE_S, WINDOW, THIS_RUN), "{{run}} wait for a shard"),
                        Query(rate(names.REPLICA_BLOCKED_S, WINDOW, THIS_RUN), "{{run}} wait for the student"),
                        Query(latest(names.TEACHER_REPLICAS, THIS_RUN), "{{run}} in the pool"),
                    ],
                    "short",
                ),
                Panel(
                    "Busy by replica",
                    "Part of its time in which each teacher labelled; one well below the others is on a slow or shared node.",
                    [Query(rate(names.REPLICA_BUSY_S, WINDOW, THIS_RUN, by="run, replica"), "{{run}} {{replica}}")],
                    "percentunit",
                ),
                RUN_AHEAD,
                Panel(
                    "Teacher actors",
                    "Actors of the teacher pool by state, of all runs on the cluster.",
                    [Query('sum by (State) (ray_actors{Source="gcs",Name=~"MapWorker.*Labeller.*"})', "{{State}}")],
                    "short",
                ),
                WAITING,
                WORKER_DEATHS,
            ],
        ),
    ],
)


def _ray(
    title: str,
    description: str,
    unit: str,
    *queries: tuple[str, str],
    thresholds: Sequence[tuple[float, str]] = (),
    optional: str | None = None,
) -> Panel:
    """A panel of Ray's own metrics; a query is an expression, with `%` for the chosen Ray sessions, and a legend."""
    here = [Query(expr.replace("%", 'SessionName=~"$session"'), legend) for expr, legend in queries]
    return Panel(title, description, here, unit, thresholds=thresholds, optional=optional)


def _node(title: str, description: str, expr: str, unit: str = "percentunit", optional: str | None = None) -> Panel:
    """A panel with a line for each node, or for each GPU of it."""
    return _ray(title, description, unit, (expr, "{{ip}} {{GpuIndex}}"), optional=optional)


NO_GPU = "no node has a GPU"
CLUSTER = Dashboard(
    "distill-cluster",
    "Distill / Cluster",
    "What the cluster carries, in Ray's own metrics: all runs and everything else on it.",
    SESSION,
    [
        Row(
            "Nodes",
            [
                _node("CPU", "Utilisation of each node's cores.", "ray_node_cpu_utilization{%} / 100"),
                _node(
                    "Memory",
                    "Memory in use on each node; Ray kills workers near the top.",
                    "ray_node_mem_used{%} / ray_node_mem_total{%}",
                ),
                _node(
                    "Disk",
                    "Part of the disk in use.",
                    "ray_node_disk_usage{%} / (ray_node_disk_usage{%} + ray_node_disk_free{%})",
                ),
                _node("GPU", "Utilisation of each GPU.", "ray_node_gpus_utilization{%} / 100", optional=NO_GPU),
                _node(
                    "GPU memory",
                    "Part of each GPU's memory in use.",
                    "ray_node_gram_used{%} / (ray_node_gram_used{%} + ray_node_gram_available{%})",
                    optional=NO_GPU,
                ),
                _node("Network", "Bytes received per second.", "ray_node_network_receive_speed{%}", "Bps"),
            ],
        ),
        Row(
            "Ray",
            [
                _ray(
                    "Resources in use",
                    "Logical CPUs and GPUs that tasks, actors and placement groups hold.",
                    "short",
                    ('sum by (Name) (ray_resources{%,State="USED",Name=~"CPU|GPU"})', "{{Name}} used"),
                    ('sum by (Name) (ray_resources{%,Name=~"CPU|GPU"})', "{{Name}} in all"),
                ),
                _ray("Actors", "Actors by state.", "short", ('sum by (State) (ray_actors{%,Source="gcs"})', "{{State}}")),
                _ray(
                    "Tasks",
                    "Unfinished tasks by state; many pending ones wait for resources.",
                    "short",
                    ('sum by (State) (ray_tasks{%,State!~"FINISHED|FAILED"})', "{{State}}"),
                ),
                _ray(
                    "Object store",
                    "Bytes of objects by where they are; labels never pass through it.",
                    "bytes",
                    ("sum by (Location) (ray_object_store_memory{%})", "{{Location}}"),
                    ('sum (ray_resources{%,Name="object_store_memory"})', "capacity"),
                ),
                _ray(
                    "Spilled",
                    "Objects that did not fit and lie on disk.",
                    "bytes",
                    ('sum by (instance) (ray_object_store_memory{%,Location="SPILLED"})', "{{instance}}"),
                    thresholds=[(1, "orange")],
                ),
                WORKER_DEATHS,
            ],
        ),
    ],
)

DASHBOARDS = (OVERVIEW, TRAINING, LABELLING, CLUSTER)
