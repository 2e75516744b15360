"""Reads files of recorded data: JSON, and tables of comma-separated values.

Every fault names the file, the line (from 1, which is the header) and the column.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from flowml.errors import TraceError, one_line
from flowml.numbers import MOST

Row: TypeAlias = dict[str, Any]
Column: TypeAlias = Callable[[str], Any]
"""Reads one field. Raises ValueError, whose text says what is expected."""


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def number(text: str) -> int:
    """A whole number of at least 0, as messages count."""
    found = integer(text)
    if not 0 <= found <= MOST:
        raise ValueError("a whole number of at least 0 and below 2**53")
    return found


def seconds(text: str) -> float:
    """A finite number of at least 0."""
    found = _float(text)
    if not 0 <= found < math.inf:
        raise ValueError("a finite number of at least 0")
    return found


def positive(text: str) -> float:
    """A finite number above 0."""
    found = _float(text)
    if not 0 < found < math.inf:
        raise ValueError("a finite number above 0")
    return found


def word(text: str) -> str:
    if not text.strip():
        raise ValueError("a name")
    return text.strip()


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


class Numbered(NamedTuple):
    """A row with its line in the file, for errors about its meaning."""

    line: int
    values: Row


AGAIN = "so copy or download it again"
"""What to do with a file that is damaged or cut short."""


def unread(file: Path, error: OSError) -> str:
    """The message about a file that cannot be opened."""
    return f"{file} cannot be read: {error.strerror}; give the path of a file that is there and that you may read"


def text_of(file: Path) -> str:
    """The text of a file. Raises TraceError, which names the path as given, if it cannot be read."""
    try:
        return file.read_text()
    except OSError as error:
        raise TraceError(unread(file, error)) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise TraceError(f"{file}, line {line}: the bytes there are not text; the file is damaged, {AGAIN}") from None


def json_of(file: Path) -> Any:
    """The content of a JSON file. Raises TraceError, which names the line and column."""
    try:
        return json.loads(text_of(file))
    except json.JSONDecodeError as error:
        raise TraceError(
            f"{file}, line {error.lineno}, column {error.colno}: {error.msg}; the file is damaged or cut short, {AGAIN}"
        ) from None


def read(text: str, name: str, columns: Mapping[str, Column]) -> list[Numbered]:
    """The rows of a table that has at least the given columns. Blank lines are left out; other columns are ignored.

    Raises:
        TraceError: if a column is missing, a line has too few or too many fields, or a field cannot be read.
    """
    lines = csv.reader(text.splitlines())
    try:
        header = [title.strip() for title in next(lines, [])]
        fields = [(lines.line_num, line) for line in lines if line]
    except csv.Error as error:
        raise TraceError(f"{name}, line {lines.line_num}: {error}; the file is damaged, {AGAIN}") from None
    return check(header, fields, name, columns)


def check(
    header: Sequence[str], lines: Iterable[tuple[int, Sequence[str]]], name: str, columns: Mapping[str, Column]
) -> list[Numbered]:
    """Like `read`, from fields with the numbers of their lines."""
    _check_header(header, name, columns)
    rows = [_row(fields, line, header, name, columns) for line, fields in lines]
    if not rows:
        raise TraceError(f"{name}, line 2: there is no row after the header; the file is cut short, {AGAIN}")
    return rows


def _check_header(header: Sequence[str], name: str, columns: Mapping[str, Column]) -> None:
    for title in columns:
        if title not in header:
            there = ", ".join(map(one_line, header)) or "none"
            raise TraceError(
                f"{name}, line 1: column {title!r} is missing; the columns there are {there}; "
                "add it, or name one of them so"
            )


def _row(fields: Sequence[str], line: int, header: Sequence[str], name: str, columns: Mapping[str, Column]) -> Numbered:
    if len(fields) < len(header):
        missing = header[len(fields)]
        raise TraceError(
            f"{name}, line {line}: column {missing!r} is missing; the line is cut short or damaged, {AGAIN}"
        )
    if len(fields) > len(header):
        raise TraceError(
            f"{name}, line {line}: {len(fields)} fields in {len(header)} columns, so they cannot be told apart; "
            "give each line a field for each column, and put fields with a comma in quotes"
        )
    found: Row = {}
    for title, field in zip(header, fields, strict=True):
        if title in columns:
            try:
                found[title] = columns[title](field)
            except ValueError as error:
                raise TraceError(f"{name}, line {line}, column {title!r}: {one_line(field)!r} is not {error}") from None
    return Numbered(line, found)
