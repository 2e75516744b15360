"""Formats numbers for readers: binary units for bytes, three significant digits for others."""

from __future__ import annotations

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def bytes_text(nbytes: float) -> str:
    """`1536 -> "1.5 KiB"`. Whole bytes stay whole."""
    scaled, unit = _scale(nbytes, _BINARY, 1024)
    return f"{scaled:.0f} B" if unit == "B" else f"{_three(scaled)} {unit}"


def flops_text(flops: float) -> str:
    """Floating point operations: `5.1e7 -> "51 MFLOP"`."""
    scaled, unit = _scale(flops, _DECIMAL, 1000)
    return f"{_three(scaled)} {unit}FLOP"


def seconds_text(seconds: float) -> str:
    """`0.0041 -> "4.1 ms"`; infinity and not-a-number have names."""
    if seconds != seconds or seconds in (float("inf"), float("-inf")):
        return "unknown"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{_three(seconds / factor)} {unit}"
    return "0 s" if seconds <= 0 else f"{_three(seconds / 1e-9)} ns"


def rate_text(bytes_per_s: float) -> str:
    """`6.1e9 -> "6.1 GB/s"`; arrays passed by reference have no rate."""
    if bytes_per_s == float("inf"):
        return "by reference"
    scaled, unit = _scale(bytes_per_s, _DECIMAL, 1000)
    return f"{_three(scaled)} {unit}B/s"


def plural(number: int, noun: str, many: str = "") -> str:
    """`plural(2, "task") -> "2 tasks"`."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def clip(text: str, length: int) -> str:
    """One line of at most `length` printable characters; an ellipsis marks what is left out."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= length else f"{line[: max(length - 1, 0)]}…"


def listed(names: tuple[str, ...], shown: int = 3) -> str:
    """`a, b, c and 4 more`."""
    head = ", ".join(names[:shown])
    rest = len(names) - shown
    return f"{head} and {rest} more" if rest > 0 else head


def _scale(value: float, units: tuple[str, ...], base: int) -> tuple[float, str]:
    index = 0
    while abs(value) >= base - 0.5 and index < len(units) - 1:
        value /= base
        index += 1
    return value, units[index]


def _three(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".")
