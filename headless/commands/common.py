"""What commands share: help with examples, output for people and for programs, values from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headless.errors import MosaicError

if TYPE_CHECKING:
    from headless.data.pattern import Pattern

Commands = Any  # what add_subparsers returns; argparse does not name it publicly


def command(
    commands: Commands, name: str, call: Callable[[argparse.Namespace], int], summary: str, text: str, examples: str
) -> argparse.ArgumentParser:
    """A subcommand with its help: summary in the list of commands, text and examples in its own."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog="examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(call=call)
    return parser


def project_argument(parser: argparse.ArgumentParser) -> None:
    """The project file, first of all."""
    parser.add_argument("project", type=Path, metavar="STUDY", help="the project file, for example study.mosaic")


def json_argument(parser: argparse.ArgumentParser, text: str = "print JSON for programs") -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help=text)


def say(text: str = "") -> None:
    """A line for people."""
    print(text, flush=True)


def note(text: str) -> None:
    """A remark that is not the answer: to stderr, so that pipes stay clean."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def print_json(values: Any) -> None:
    """The answer for programs, on one line."""
    from headless.files import as_json

    print(as_json(values), flush=True)


def print_error(error: MosaicError, as_json: bool) -> None:
    """An error to stderr: code, message, where, what to do."""
    if as_json:
        print(json.dumps({"kind": "error", **error.as_dict()}), file=sys.stderr)
        return
    lines = [f"error [{error.code}]: {error.message}"]
    places = [f"{key} {value}" for key, value in error.where.items()]
    if error.field:
        places.append(f"field {error.field}")
    if places:
        lines.append(f"  where: {', '.join(places)}")
    if error.hint:
        lines.append(f"  what to do: {error.hint}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[object]], header: Sequence[str], indent: str = "  ") -> str:
    """Plain columns; numbers to the right."""
    cells = [list(header), *([("" if value is None else str(value)) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(isinstance(row[i], (int, float)) or row[i] is None for row in rows) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [
            value.rjust(width) if flush else value.ljust(width)
            for value, width, flush in zip(row, widths, right, strict=True)
        ]
        lines.append((indent + "  ".join(parts)).rstrip())
    return "\n".join(lines)


def mosaic_map(pattern: Pattern) -> str:
    """Batches x modalities: cells that have it x features measured; a dot where nothing was measured."""
    tiles = {(tile.batch, tile.modality): tile for tile in pattern.tiles}
    rows = []
    for batch in pattern.batches:
        shown = [
            f"{tile.n_cells} x {tile.n_features}" if (tile := tiles.get((batch, modality))) else "."
            for modality in pattern.modalities
        ]
        rows.append([batch, pattern.n_cells[batch], *shown])
    return table(rows, ["batch", "cells", *pattern.modalities])


def assignments(items: Sequence[str], option: str) -> dict[str, Any]:
    """``["max_epochs=50", "dim_c=16"]`` as a dictionary; values are read as JSON where they are, else as text.

    Raises
    ------
    MosaicError
        ``usage.assignment``.
    """
    return {name: value_of(text) for name, text in texts(items, option).items()}


def texts(items: Sequence[str], option: str) -> dict[str, str]:
    """``["max_epochs=50"]`` as ``{"max_epochs": "50"}``. Raises ``usage.assignment``."""
    values: dict[str, str] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise MosaicError("usage.assignment", f"{option} {item!r} is not NAME=VALUE.", f"{option} max_epochs=50")
        values[name.strip()] = text.strip()
    return values


def listed(text: str) -> list[Any]:
    """``1e-3,2e-3`` or ``[8,8],[16]`` or ``full,fast`` as the list of its values."""
    try:
        found = json.loads(f"[{text}]")
    except ValueError:
        found = [value_of(item.strip()) for item in text.split(",") if item.strip()]
    return list(found)


def value_of(text: str) -> Any:
    """A number, true, false, none, a list ... or the text itself."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def names_list(items: Sequence[str] | None) -> tuple[str, ...]:
    """``["a,b", "c"]`` as ``("a", "b", "c")``."""
    return tuple(name.strip() for item in items or () for name in item.split(",") if name.strip())
