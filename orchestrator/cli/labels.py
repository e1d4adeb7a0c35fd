"""The verbs for a label log: look into it, check it, and have what is lost made again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.options import AsJson
from orchestrator.cli.usage import group
from orchestrator.errors import IntegrityError, SpecError

if TYPE_CHECKING:
    from orchestrator.store.label_log import LabelLog
    from orchestrator.store.label_repair import Loss

NAMED = 20
"""Lost shards that are named one by one."""

labels_app = group("labels", "Look into a label log.")

Log = Annotated[str, typer.Argument(metavar="LOG", help="Label log: STORAGE/labels/KEY.")]


@labels_app.command("inspect")
def inspect(path: Log, as_json: AsJson = False) -> None:
    """Show what a label log holds, what each column costs, and the entropy of what is in it."""
    from dataclasses import asdict

    from orchestrator.labels.inspect import label_costs

    log = _open_log(path)
    shards = log.all_committed()
    rows, size = sum(r.rows for _, r in shards), sum(r.bytes for _, r in shards)
    facts: dict[str, Any] = {"key": log.key, "shards": len(shards), "rows": rows, "bytes": size, "identity": log.identity()}
    costs = label_costs(log)
    facts["bytes_per_token"] = asdict(costs)
    if as_json:
        print(json.dumps(facts))
    else:
        print(f"{log.key}: {len(shards)} shards, {rows:,} rows, {size:,} bytes")
        print(json.dumps(facts["identity"], indent=1))
        print("bytes per token:")
        for name, value in costs.columns.items():
            print(f"  {value:9.3f}  {name}")
        for name, value in costs.bounds.items():
            print(f"  {value:9.3f}  entropy bound of {name}")
        for name, value in costs.unique_ids.items():
            print(f"  {value:9.2f}  unique ids at temperature {name}")


@labels_app.command("verify")
def verify(path: Log) -> None:
    """Read every shard of a label log and check every byte; exit code 5 if any is missing or damaged."""
    from orchestrator.store.label_repair import count, examine

    intact, losses = examine(_open_log(path))
    _show(losses)
    print(f"{len(intact)} shards, {sum(r.rows for r in intact.values()):,} rows: intact")
    if losses:
        raise IntegrityError(f"{path}: {count(losses)}; distill labels repair {path} has them labelled again")


@labels_app.command("repair")
def repair(
    path: Log, dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be given up.")] = False
) -> None:
    """Give up the shards that are missing or damaged, so that running the job again labels these anew; the others stay."""
    from orchestrator.store.label_repair import count, examine, give_up

    log = _open_log(path)
    intact, losses = examine(log)
    _show(losses)
    if not losses:
        print(f"{len(intact)} shards: intact, nothing to repair")
    elif dry_run:
        print(f"{count(losses)}: would be given up; {len(intact)} intact shards would stay")
    else:
        given_up = give_up(log, losses)
        print(f"{len(given_up)} shards given up, {len(intact)} intact shards stay; run the job again, it labels these anew")


def _show(losses: list[Loss]) -> None:
    for loss in losses[:NAMED]:
        print(loss.problem)
    if len(losses) > NAMED:
        print(f"… and {len(losses) - NAMED} more")


def _open_log(path: str) -> LabelLog:
    from orchestrator.store.files import open_store
    from orchestrator.store.heldout import ANSWERS
    from orchestrator.store.label_log import LabelLog

    address = open_store(path).address()
    storage, root, key = address.rsplit("/", 2)
    if root not in ("labels", ANSWERS) or not open_store(address).exists("key.json"):
        raise SpecError(f"{path}: not a label log; give STORAGE/labels/KEY, where a run's report.json has the KEY")
    return LabelLog(open_store(storage), key, root)
