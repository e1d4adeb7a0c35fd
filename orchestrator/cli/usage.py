"""Messages for wrong use of the command: one line that says what is wrong and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer import _click as click
from typer.core import TyperGroup

from orchestrator.runtime.signals import heard

HELP = {"help_option_names": ["-h", "--help"]}
EXAMPLES = {
    "JOB": ("jobs/quickstart.yaml", "distill init makes one"),
    "ID": ("quickstart", "distill list shows them"),
    "RUN": ("STORAGE/runs/quickstart", "a run prints it as its first line"),
    "KEY=a,b,c": ("JOB --grid objective.alpha=0,0.1,1", "distill schema lists the keys"),
    "LOG": ("STORAGE/labels/KEY", "report.json of a run has the KEY"),
    "DIR": ("monitoring", "it is made if it is not there"),
}
"""An example value of each argument, and the place that such a value comes from."""
MEANINGS = {"float": "a number", "int": "a whole number"}


class Group(TyperGroup):
    """Verbs that belong together; without one of them, they are listed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # of which the library would make an exit without a word
            raise Interrupted from error
        except Exception as error:
            stop = heard()
            if stop is None:
                raise
            stop.__context__ = error
            raise Interrupted from stop


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM while a verb was at work; its cause says which."""


def group(name: str | None = None, help: str | None = None, **options: Any) -> typer.Typer:
    """A group of verbs, as all groups here are: plain text, -h, and help where no verb is given."""
    return typer.Typer(name=name, help=help, cls=Group, context_settings=HELP, rich_markup_mode=None, **options)


@dataclass(frozen=True)
class Place:
    """The place on the command line at which something went wrong."""

    verb: str
    """Without the name of the program; empty for the program itself."""
    command: Any

    @property
    def call(self) -> str:
        return f"distill {self.verb}".rstrip()

    @property
    def usage(self) -> str:
        arguments = [p.metavar or p.name.upper() for p in self.command.params if p.param_type_name == "argument"]
        return " ".join([self.call, *arguments])


def explain(error: typer.TyperException, app: typer.Typer, args: Sequence[str]) -> str:
    """Return one line that says what is wrong with the command line `args`."""
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path.partition(" ")[2] if ctx else ""
    place = Place(path, ctx.command) if ctx else find_place(typer.main.get_command(app), args)
    match error:
        case click.exceptions.MissingParameter(param=param) if param is not None:
            option = f"{param.opts[0]} " if param.param_type_name == "option" else ""
            return _missing(place, option, (param.metavar or param.name.upper()).strip("[]"))
        case click.exceptions.BadParameter(param=param) if param is not None:
            problem = f"{max(param.opts, key=len)} {_bad_value(error)}"
        case click.exceptions.NoSuchOption(option_name=name):
            problem = f"no option {name}{_options_like(name, place)}"
        case click.exceptions.BadOptionUsage(option_name=name):
            problem = _option_without_value(name, error.format_message(), place)
        case _ if isinstance(place.command, TyperGroup):
            words = [word for word in args if not word.startswith("-")]
            problem = _no_such_verb(words[len(place.verb.split())], place, app)
        case _:
            problem = _one_too_many(error.format_message(), place)
    return f"{place.verb}: {problem}" if place.verb else problem


def find_place(command: Any, args: Sequence[str]) -> Place:
    """The verb that `args` lead to, or the group where they lead astray."""
    path: list[str] = []
    for word in args:
        if not isinstance(command, TyperGroup):
            break
        if not word.startswith("-"):
            found = command.commands.get(word)
            if found is None:
                break
            command, path = found, [*path, word]
    return Place(" ".join(path), command)


def verbs(command: Any, path: str = "") -> Iterator[str]:
    """Every verb under `command`, its groups before it: `labels verify`."""
    if not isinstance(command, TyperGroup):
        yield path
        return
    for name, inner in command.commands.items():
        yield from verbs(inner, f"{path} {name}".strip())


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` may have been meant to be."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def _missing(place: Place, option: str, argument: str) -> str:
    if argument not in EXAMPLES:
        return f"{place.verb} needs {option}{argument}; {place.call} -h explains it"
    example, origin = EXAMPLES[argument]
    return f"{place.verb} needs {option}{argument}, for example {place.call} {example}; {origin}"


def _bad_value(error: click.exceptions.BadParameter) -> str:
    found: Any = error.__cause__
    if not hasattr(found, "errors"):
        return error.message
    first = found.errors(include_url=False)[0]
    expected = MEANINGS.get(first["type"].partition("_")[0])
    problem = f"must be {expected}" if expected else first["msg"][:1].lower() + first["msg"][1:]
    return f"{problem}, got {first['input']!r}"


def _options_like(name: str, place: Place) -> str:
    known = [option for p in place.command.params if p.param_type_name == "option" for option in p.opts]
    meant = did_you_mean(name, [option for option in [*known, "--help"] if option.startswith("--")])
    return f", did you mean {meant}?" if meant else f"; {place.call} -h lists those there are"


def _option_without_value(name: str, problem: str, place: Place) -> str:
    if "does not take" in problem:
        return f"{name} takes no value; write {name} alone"
    option = next(p for p in place.command.params if name in p.opts)
    values = "a value" if option.nargs == 1 else f"{option.nargs} values"
    return f"{name} needs {values}{f', {name} {option.metavar}' if option.metavar else ''}; {place.call} -h explains it"


def _no_such_verb(word: str, place: Place, app: typer.Typer) -> str:
    """For a word that no verb has; a job file in its place was meant to be run."""
    if not place.verb and (word.endswith((".yaml", ".yml")) or Path(word).is_file()):
        return f"{word}: no such command, did you mean distill run {word}?"
    elsewhere = {path.split()[-1]: path for path in verbs(typer.main.get_command(app))}
    meant = f"distill {elsewhere[word]}" if word in elsewhere else did_you_mean(word, place.command.commands)
    return f"{word}: no such command" + (f", did you mean {meant}?" if meant else f"; {place.call} -h lists those there are")


def _one_too_many(problem: str, place: Place) -> str:
    listed = re.search(r"\(([^()]*)\)$", problem)
    word = listed[1].split()[0] if listed and listed[1] else problem
    if "=" in word:
        return f"{word} stands alone, did you mean --set {word}?"
    return f"{word} is one word too many; the command is {place.usage}"
