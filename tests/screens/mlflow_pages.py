"""Pictures of MLflow's own pages with the runs of a storage: `python -m tests.screens.mlflow_pages STORAGE FOLDER`.

The table sorted by held-out cross entropy with the parameter beside it, and the compare view with one against the other.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orchestrator.tracking.mlflow_tracker import sqlite_uri
from tests.e2e.mlflow_runs import Server, client
from tests.screens.browser import Browser, browser

PARAMETER, METRIC, KL = "objective.alpha", "student/heldout_ce_nats", "student/kl_to_teacher_nats"
COLUMNS = [f"params.`{PARAMETER}`", *(f"metrics.`{name}`" for name in (METRIC, KL, "student/top1_agreement"))]
FILTER = f"params.`{PARAMETER}` LIKE '%'"
"""Children have no such parameter."""
WIDTH, HEIGHT = 1300, 760


def picture(database: str, folder: Path) -> list[Path]:
    """Write mlflow-runs.png and mlflow-compare.png into `folder`, of the runs in the MLflow `database`."""
    experiment = client(database).get_experiment_by_name("distill").experiment_id
    runs = [run for run in client(database).search_runs([experiment]) if "mlflow.parentRunId" not in run.data.tags]
    files = [folder / "mlflow-runs.png", folder / "mlflow-compare.png"]
    with tempfile.TemporaryDirectory() as scratch:
        server = Server(Path(scratch), database)
        server.start()
        try:
            server.wait()
            with browser(Path(scratch), WIDTH, HEIGHT) as page:
                prepare(page, server.uri, experiment)
                picture_table(page, f"{server.uri}/#/experiments/{experiment}/runs", runs, files[0])
                ids = json.dumps([run.info.run_id for run in runs])
                picture_comparison(
                    page, f"{server.uri}/#/compare-runs?runs={ids}&experiments={json.dumps([experiment])}", files[1]
                )
        finally:
            server.kill()
    return files


def prepare(page: Browser, address: str, experiment: str) -> None:
    """Leave in the browser what a person would have clicked: these columns, no assistant."""
    page.open(f"{address}/#/experiments")
    page.shows("distill")
    state = {
        "selectedColumns": COLUMNS,
        "orderByKey": f"metrics.`{METRIC}`",
        "orderByAsc": True,
        "columnWidths": dict.fromkeys(COLUMNS, 210),
    }
    key = f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState'
    for name, value in ((key, json.dumps(state)), ("mlflow.assistant.panelOpen_v1", "false")):
        page.run(f"localStorage.setItem({json.dumps(name)}, {json.dumps(value)})")
    page.open("about:blank")  # so that the next address is loaded, not merely gone to


def picture_table(page: Browser, address: str, runs: list[Any], file: Path) -> None:
    order, chosen = (quote(text, safe="") for text in (f"metrics.`{METRIC}`", FILTER))
    page.open(f"{address}?searchFilter={chosen}&orderByKey={order}&orderByAsc=true")
    for run in runs:
        page.shows(run.data.params[PARAMETER])
        page.shows(run.info.run_name)
    page.shows(KL)
    page.settle()
    page.shot(file)


def picture_comparison(page: Browser, address: str, file: Path) -> None:
    page.open(address)
    page.shows("Scatter Plot")
    page.settle()
    page.click("[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText == 'Scatter Plot')")
    page.shows("X-axis")
    for axis, wanted in (("x", PARAMETER), ("y", METRIC)):
        page.click(f"document.getElementById('{axis}-axis-selector')")
        page.settle()
        option = f"[...document.querySelectorAll('[role=option]')].find(option => option.innerText == '{wanted}')"
        page.run(f"{option}.scrollIntoView()")
        page.click(option)
        page.settle()
    page.shows(METRIC)
    page.shot(file)


if __name__ == "__main__":
    storage, folder = map(Path, sys.argv[1:])
    for written in picture(sqlite_uri(storage.absolute() / "mlflow.db"), folder):
        print(written, written.stat().st_size)
