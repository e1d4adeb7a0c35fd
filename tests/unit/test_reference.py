"""The key reference says every key there is, and the committed file is what the code says now."""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.spec.reference import reference_markdown
from orchestrator.spec.schema import root

FILE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_committed_reference_is_up_to_date() -> None:
    assert FILE.read_text() == reference_markdown(), "run: make docs"


def test_every_section_and_key_is_there_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", reference_markdown(), flags=re.MULTILINE)
    sections = [root(), *(node for node in root()["$defs"].values() if "properties" in node)]
    assert sorted(rows) == sorted(key for section in sections for key in section["properties"])


def test_links_lead_to_headings() -> None:
    text = reference_markdown()
    headings = [
        re.sub(r"[^\w\- ]", "", line[3:].lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("## ")
    ]
    assert len(set(headings)) == len(headings)
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= set(headings)
