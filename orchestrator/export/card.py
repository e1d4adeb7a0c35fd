"""The model card of an export: what was distilled from what, on which data, how, and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from orchestrator.export.release import Release, Source, hub_name, shown
from orchestrator.models.tokenizer import SETTINGS
from orchestrator.spec.data import DatasetSource
from orchestrator.spec.objective import Objective, Schedule
from orchestrator.tracking.figures import recovered

FIGURES = {
    "params": ("parameters", ",.0f"),
    "heldout_ce_nats": ("held-out CE (nats)", ".4f"),
    "heldout_ppl": ("perplexity", ".2f"),
    "top1_accuracy": ("top-1 accuracy", ".4f"),
    "kl_to_teacher_nats": ("KL to the teacher (nats)", ".4f"),
    "top1_agreement": ("top-1 agreement with the teacher", ".4f"),
}
"""By key of report.json: heading and format."""


def model_card(release: Release, sources: list[Source], folder: Path) -> str:
    """Markdown with YAML front matter, for the model in `folder`, which was made from `sources`, the teacher first."""
    job, report, teacher = release.job, release.report, sources[0]
    corpus = job.data.source
    licence: dict[str, Any] = {"license": "unknown"} | teacher.licence
    front = ModelCardData(
        **licence,
        base_model=[source.on_hub for source in sources if source.on_hub] or None,
        datasets=[corpus.name] if isinstance(corpus, DatasetSource) and hub_name(corpus.name) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation"],
    )
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {report['name']}",
        f"A language model of {report['student']['params']:,} parameters, distilled from {teacher.text}"
        + (f", which has {report['teacher']['params']:,}." if report["teacher"] else "."),
        _licence(sources),
        "## Use\n\nIn this folder:\n\n```python\n" + snippet(folder) + "```",
        "## Figures\n\n" + _figures(report),
        "## Data\n\n" + _data(release),
        "## Training\n\n" + _training(release, sources),
        "## Limits\n\n"
        f"It was trained on windows of {job.data.seq_len:,} tokens; how it does beyond that length was not measured. The "
        "figures hold for documents held out of the same data. What its teacher gets wrong, or should not have learnt, it may "
        "have learnt as well: nothing here has tested it for errors of fact, for bias or for safety.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def snippet(folder: Path) -> str:
    """Python that generates text with the model in `folder`, run inside it; as a chat if its tokenizer has a template."""
    chat = (folder / "chat_template.jinja").is_file() or '"chat_template"' in (folder / SETTINGS).read_text("utf-8")
    prompt = (
        'chat = [{"role": "user", "content": "What is a list?"}]\n'
        'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        if chat
        else 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        f"{prompt}"
        "output = model.generate(**inputs, max_new_tokens=64)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))\n"
    )


def _licence(sources: list[Source]) -> str:
    """Describe the known licences of what the model was made from; empty if no source has a name."""
    named = [f"{source.text}: {source.licence.get('license', 'not stated')}" for source in sources if source.text[0] == "`"]
    return f"Licences of what it was made from, as their cards state them: {', '.join(named)}." if named else ""


def _figures(report: dict[str, Any]) -> str:
    """A table of models, and what the student has gained over its baseline."""
    columns = [(key, *how) for key, how in FIGURES.items()]
    lines = ["| model | " + " | ".join(title for _, title, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in ("teacher", "student", "baseline"):
        if figures := report.get(name):
            cells = [format(figures[key], form) if key in figures else "" for key, _, form in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    if report.get("baseline"):
        text += "\n\nThe baseline is the same model trained on the same rows without a teacher."
    closed = recovered(report)
    if closed is not None:
        text += f" The student closes {closed:.1%} of the gap between baseline and teacher."
    return text


def _data(release: Release) -> str:
    """The corpus, counted."""
    corpus, tokens = release.job.data.source, release.tokens.manifest
    where = (
        corpus.name if isinstance(corpus, DatasetSource) else ", ".join(shown(path) for path in getattr(corpus, "paths", ()))
    )
    named = f"`{where}` ({corpus.kind})" if where else "The source files of the Python standard library"
    trained = sum(tokens.shard_rows) * tokens.seq_len
    return (
        f"{named}: {tokens.documents:,} documents for training, {trained:,} tokens, and {tokens.heldout_documents:,} held out "
        "for the figures."
    )


def _training(release: Release, sources: list[Source]) -> str:
    """Return a list of the facts about how the student was made."""
    job, tokens, train = release.job, release.tokens.manifest, release.job.train
    steps = int(release.student.manifest.training["steps"])
    rows = steps * train.global_batch
    own = job.data.tokenizer.kind == "train"
    start = f"{job.student.kind} {sources[1].text}" if len(sources) > 1 else job.student.kind
    items = {
        "Tokenizer": f"{'trained on the same data' if own else 'of the teacher'}, {tokens.vocab_size:,} ids",
        "Start": f"{start}, seed {job.seed}",
        "Labels": f"{job.labels.kind}, {release.report['labels']['bytes_per_token']:.1f} bytes per token",
        "Objective": _objective(job.objective),
        "Steps": f"{steps:,} of {train.global_batch:,} rows of {tokens.seq_len:,} tokens: {rows:,} rows, "
        f"{rows / sum(tokens.shard_rows):.2f} passes over the data",
        "Learning rate": f"{train.learning_rate:g}, {train.schedule}, {train.precision}",
    }
    return "\n".join(f"- {name}: {text}" for name, text in items.items())


def _objective(objective: Objective) -> str:
    kinds = " + ".join(f"{d.weight:g} {d.kind}" for d in objective.divergences)
    alpha, temperature = (_scheduled(value) for value in (objective.alpha, objective.temperature))
    extra = f", {len(objective.features)} losses on inner layers" if objective.features else ""
    return f"alpha {alpha} on hard labels, the rest on the teacher's: {kinds} at temperature {temperature}{extra}"


def _scheduled(value: float | Schedule) -> str:
    return f"{value.start:g} to {value.end:g}" if isinstance(value, Schedule) else f"{value:g}"
