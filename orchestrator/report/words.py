"""Numbers and text as people read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

NOTHING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with `digits` decimals."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def perplexity(value: float | None, ce: float | None) -> str:
    """Format the perplexity of a finite cross entropy `ce`; infinity is null in JSON, which has no infinite numbers."""
    return "∞" if value is None and ce is not None else number(value, 2)


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return NOTHING if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """Three significant digits with a decimal prefix: `270 M`, `1.24 B`."""
    return NOTHING if value is None else _prefixed(value, ("", "k", "M", "B", "T"))


def size(value: float | None) -> str:
    """A number of bytes with a decimal prefix: `1.08 GB`."""
    return NOTHING if value is None else _prefixed(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def percent(value: float | None) -> str:
    """A fraction in percent; one decimal where whole percents would round something to nothing or to all."""
    if value is None:
        return NOTHING
    whole = abs(value) >= 0.0995 and abs(value) <= 0.9949
    return f"{100 * value:.{0 if whole or value in (0, 1) else 1}f} %".replace("-", "−")


def interval(bounds: Sequence[float] | None, shown: Callable[[float], str]) -> str:
    """`18 % to 31 %`, with both ends as `shown` writes them; empty for None."""
    return "" if bounds is None else f"{shown(bounds[0])} to {shown(bounds[1])}"


def nats(value: float | None) -> str:
    """Two significant digits: `0.0012`, `0.25`, `3.1`."""
    return NOTHING if value is None else f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def seconds(value: float | None) -> str:
    """A duration in words: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if value is None:
        return NOTHING
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def visible(text: str) -> str:
    """`text` with ends of line and tabs as signs, and everything else that is invisible or changes direction as its code."""
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def _prefixed(value: float, prefixes: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 99.95 or (power == 0 and value == int(value)) else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[power]}".strip()
