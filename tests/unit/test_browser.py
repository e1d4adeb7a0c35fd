"""Opening a page where there is a display, and where there is none."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path

import pytest

from orchestrator.report.browser import local_page, open_page
from orchestrator.store.local import LocalStore


@pytest.mark.parametrize(
    ("variable", "opened"), [("DISPLAY", True), ("WAYLAND_DISPLAY", True), ("BROWSER", True), ("LANG", False)]
)
def test_a_browser_is_started_only_where_it_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, opened: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: asked.append(url) or True)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "x")
    page = tmp_path / "a report.html"
    assert open_page(page) is opened
    assert asked == ([page.as_uri()] if opened else [])


def test_the_page_of_a_run_is_the_file_itself_or_missing(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>")
    assert local_page(LocalStore(tmp_path), "report.html") == tmp_path / "report.html"
    with pytest.raises(FileNotFoundError):
        local_page(LocalStore(tmp_path), "other.html")


def test_a_page_in_a_bucket_is_copied(tmp_path: Path) -> None:
    class Bucket(LocalStore):
        def address(self, key: str = "") -> str:
            return f"s3://bucket/{key}"

    (tmp_path / "report.html").write_text("<p>hello")
    assert local_page(Bucket(tmp_path), "report.html").read_text() == "<p>hello"
