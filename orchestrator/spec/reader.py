"""YAML to plain values, each with the place it was written at; a small and safe part of YAML 1.2.

Works on parser events, so that aliases, tags, depth and size are refused before anything is built of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from pydantic import JsonValue

from orchestrator.errors import SpecError

Keys = tuple[str | int, ...]
Section = dict[str, JsonValue]

MAX_DEPTH = 50
MAX_VALUES = 5_000
_MAX_DIGITS = 1000
_MAX_INTERPOLATED = 1000

_CONSTANTS = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"), None)
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.inf|\.nan", re.IGNORECASE)
_STAIRS = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")  # the parser would look a long and slow way ahead
UNFIT_TEXT = re.compile("[\0\ud800-\udfff]")
_FOREIGN_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{(?!oc\.env:)")
_HINTS = {
    "\\t": "a tab cannot indent; use spaces",
    "anchor": "anchors (&) are not allowed; quote text that starts with &",
    "alias": "aliases (*) are not allowed; quote text that starts with *",
    "tag": "tags (!) are not allowed; quote text that starts with !",
}


class Reader:
    """Reads one document of the source called `name`; `origins` tells where each of its values was written.

    `base` goes before the keys of the document. Without `lines`, a place is the bare name.
    """

    def __init__(self, text: str, name: str, base: Keys = (), *, lines: bool = True) -> None:
        from ruamel.yaml import YAML

        self.origins: dict[Keys, str] = {}
        self._text = text
        self._name = name
        self._base = base
        self._lines = lines
        yaml: Any = YAML(typ="safe", pure=True)
        self._events: Iterator[Any] = yaml.parse(text)

    def read(self) -> JsonValue:
        """The value of the document, null for an empty one. Raises `SpecError`."""
        if stairs := _STAIRS.search(self._text):
            line = self._text.count("\n", 0, stairs.start()) + 1
            raise SpecError(f"{self._place(line)}: nested more than {MAX_DEPTH} levels deep")
        self._next()
        if _kind(self._next()) == "StreamEnd":
            return None
        value = self._value(self._next(), self._base)
        self._next()
        if _kind(after := self._next()) != "StreamEnd":
            self._fail("a second document starts here; one file is one job", after.start_mark)
        return value

    def _next(self) -> Any:
        """The next event, free of anchors, aliases and tags. Raises `SpecError`, for bad syntax too."""
        from ruamel.yaml.error import MarkedYAMLError
        from ruamel.yaml.reader import ReaderError

        try:
            event = next(self._events)
        except (MarkedYAMLError, ReaderError) as error:
            self._refuse(error)
        except (ValueError, OverflowError):
            raise SpecError(f"{self._name}: an escape sequence stands for no character") from None
        if _kind(event) == "Alias":
            self._fail(_HINTS["alias"], event.start_mark)
        for attribute, hint in (("anchor", "anchor"), ("ctag", "tag")):
            if getattr(event, attribute, None) is not None:
                self._fail(_HINTS[hint], event.start_mark)
        return event

    def _refuse(self, error: Any) -> NoReturn:
        """Raises the `SpecError` for a syntax error of the parser."""
        if hasattr(error, "position"):
            line = self._text.count("\n", 0, error.position) + 1
            raise SpecError(f"{self._place(line)}: character U+{error.character:04X} is not allowed in YAML") from None
        problem = " ".join(part for part in (error.problem, error.context) if part)
        hints = (hint for word, hint in _HINTS.items() if word in problem)
        self._fail(next(hints, problem), error.problem_mark or error.context_mark)

    def _value(self, event: Any, keys: Keys) -> JsonValue:
        """The value that starts with `event` and stands at `keys`."""
        self.origins.setdefault(keys, self._place(event.start_mark.line + 1))
        if len(self.origins) > MAX_VALUES:
            self._fail(f"more than {MAX_VALUES} values", event.start_mark)
        if len(keys) > MAX_DEPTH:
            self._fail(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        if _kind(event) == "MappingStart":
            return self._mapping(keys)
        if _kind(event) == "SequenceStart":
            items: list[JsonValue] = []
            while _kind(item := self._next()) != "SequenceEnd":
                items.append(self._value(item, (*keys, len(items))))
            return items
        return self._scalar(event)

    def _mapping(self, keys: Keys) -> Section:
        """The mapping at `keys`; a key is text, whatever it looks like."""
        mapping: Section = {}
        while _kind(event := self._next()) != "MappingEnd":
            if _kind(event) != "Scalar":
                self._fail("a key must be plain text", event.start_mark)
            key, path = self._text_of(event), (*keys, event.value)
            place = self._place(event.start_mark.line + 1)
            if key in mapping:
                raise SpecError(f"{place}: {dotted(path)}: duplicate key, first at {self.origins[path]}")
            self.origins[path] = place
            mapping[key] = self._value(self._next(), path)
        return mapping

    def _scalar(self, event: Any) -> JsonValue:
        """The constant, number or text in a scalar event: `1e-5` is a number, and `no` is text."""
        text = self._text_of(event)
        if event.implicit[0] and text in _CONSTANTS:
            return _CONSTANTS[text]
        if event.implicit[0] and len(text) <= _MAX_DIGITS:
            if _INT.fullmatch(text):
                return int(text)
            if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
                return number
            if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
                self._fail(f"{clip(text, 40)} is not a finite number", event.start_mark)
        if "${" in text:
            self._check_interpolation(text, event.start_mark)
        return text

    def _text_of(self, event: Any) -> str:
        """The characters of a scalar event, all fit for a file name and for UTF-8. Raises `SpecError`."""
        if unfit := UNFIT_TEXT.search(event.value):
            self._fail(f"character U+{ord(unfit[0]):04X} is not allowed in text", event.start_mark)
        return event.value

    def _check_interpolation(self, text: str, mark: Any) -> None:
        """Raises `SpecError` unless `text` is well-formed and asks for environment variables alone."""
        from omegaconf import OmegaConf
        from omegaconf.errors import GrammarParseError

        if _FOREIGN_INTERPOLATION.search(text):
            self._fail(r"only ${oc.env:VARIABLE} can be interpolated; write \${ for a plain ${", mark)
        if len(text) > _MAX_INTERPOLATED:
            self._fail(f"text with interpolations may have {_MAX_INTERPOLATED} characters", mark)
        try:
            OmegaConf.create([text])
        except GrammarParseError:
            self._fail("malformed interpolation, expected ${oc.env:VARIABLE} or ${oc.env:VARIABLE,default}", mark)

    def _place(self, line: int) -> str:
        return f"{self._name}:{line}" if self._lines else self._name

    def _fail(self, problem: str, mark: Any) -> NoReturn:
        place = self._place(mark.line + 1)
        raise SpecError(f"{place}:{mark.column + 1}: {problem}" if self._lines else f"{place}: {problem}") from None


def dotted(keys: Keys) -> str:
    """`keys` as they are written in an override, short enough for a message."""
    return clip(".".join(clip(str(key), 40) or "''" for key in keys), 100)


def clip(text: str, size: int) -> str:
    """`text`, its end cut off where it is longer than `size`."""
    return text if len(text) <= size else text[: size - 1] + "…"


def _kind(event: Any) -> str:
    """`Scalar` for a `ScalarEvent`; saves importing the event classes, and with them the parser, at start."""
    return type(event).__name__.removesuffix("Event")
