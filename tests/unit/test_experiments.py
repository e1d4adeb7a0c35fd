"""`distill compare` and `distill report` as commands, on runs that are in a storage already."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.past_runs import write_run


def distill(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["distill", *args])
    with pytest.raises(SystemExit) as ending:
        main()
    return int(ending.value.code or 0)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs in the storage that is looked into by itself."""
    monkeypatch.chdir(tmp_path)
    for name, alpha in (("chat", 0.1), ("chat-2", 0.9)):
        write_run(tmp_path, name, f"objective.alpha={alpha}", ce=3.3 + alpha)
    (tmp_path / "store").rename(tmp_path / "distill-store")
    return tmp_path / "distill-store"


def test_compare_prints_a_table_and_writes_a_page(
    storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(monkeypatch, "compare", "chat", "chat-2") == 0
    out = capsys.readouterr().out
    assert out.startswith("alpha 0.1 has the lowest held-out cross entropy") and "3.4000*" in out
    page = storage.parent / "compare.html"
    assert out.rstrip().endswith(f"page: {page}") and "chat-2" in page.read_text()


def test_compare_prints_data(storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(storage / "runs" / name) for name in ("chat", "chat-2")]
    assert distill(monkeypatch, "compare", *runs, "--json", "--out", "a/b.html") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(storage.parent / "a" / "b.html") and Path(found["page"]).exists()
    assert found["best"]["heldout_ce_nats"] == ["chat"]
    assert found["runs"][1]["differs"] == {"objective.alpha": 0.9}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("compare", "chat"), "at least two runs"),
        (("compare", "chat", "chat-3"), "chat-3: no such run; ./distill-store holds chat, chat-2"),
        (("compare", "chat", "chat"), "given twice"),
        (("compare", "chat", "chat-2", "--storage", "elsewhere"), "elsewhere holds no runs"),
        (("report", "chat-3"), "chat-3: no such run"),
        (("report", "chat", "--open"), "chat: has no report.html yet"),
    ],
)
def test_slips_are_one_line(
    storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    assert distill(monkeypatch, *args) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("distill: ") and err.count("\n") == 1


def test_a_report_is_found_by_the_name_of_its_run(
    storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(variable, raising=False)
    page = storage / "runs" / "chat-2" / "report.html"
    page.write_text("<p>")
    assert distill(monkeypatch, "report", "chat-2", "--open") == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert distill(monkeypatch, "report", "chat-2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["student"]["heldout_ce_nats"] == pytest.approx(4.2)
