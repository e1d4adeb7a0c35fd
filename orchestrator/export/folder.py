"""Export: the student as a Hugging Face folder with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentFault
from orchestrator.store.files import open_store, storage_faults

MTP = "mtp"


def export_model(model: Path, target: str, report: dict[str, Any], keep_mtp: bool) -> None:
    """Copy the model folder to the address `target` with a card made of `report`; an earlier export stays until all is there.

    `keep_mtp` keeps multi-token-prediction modules, if there are any, beside the model.

    Raises `EnvironmentFault` if `target` cannot be written or holds something that is no model.
    """
    store = open_store(target)
    if Path(target).expanduser().is_symlink() or (store.exists("") and not store.exists("config.json")):
        raise EnvironmentFault(f"export.directory: {target} exists and is not a model folder; it is left alone")
    with store.folder_for("") as built, storage_faults(built):
        shutil.copytree(model, built, ignore=None if keep_mtp else shutil.ignore_patterns(MTP), dirs_exist_ok=True)
        (built / "README.md").write_text(model_card(report))


def model_card(report: dict[str, Any]) -> str:
    """Markdown card: what was distilled from what, and what was measured."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation]",
        "---",
        "",
        f"# {report['name']}",
        "",
        f"A student distilled from `{report['labels']['kind']}` soft labels of a teacher with "
        f"{report['teacher']['params']:,} parameters, seed {report['seed']}.",
        "",
        "| model | parameters | held-out CE (nats) | perplexity | top-1 accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in ("teacher", "student", "baseline"):
        figures = report.get(name)
        if figures:
            lines.append(
                f"| {name} | {figures['params']:,} | {figures['heldout_ce_nats']:.4f} | "
                f"{figures['heldout_ppl']:.2f} | {figures['top1_accuracy']:.4f} |"
            )
    gap = report["gap_recovered"]
    if gap is not None:
        lines += ["", f"The student closes {gap:.1%} of the gap between the same model trained on hard labels and the teacher."]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained(".")',
        "```",
    ]
    return "\n".join(lines) + "\n"
