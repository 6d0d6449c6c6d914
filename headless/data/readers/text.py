"""Tables of counts as text: comma, semicolon or tab, gzipped or not, cells x features or features x cells.

The first line names the columns, the first field of every line names the row; R's short header (no name above the row
names) is understood. Which way round the table lies is guessed and said.
"""

from __future__ import annotations

import csv
import gzip
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headless.data.counts import Tally, is_counts, judge, refuse
from headless.data.matrix import FileInfo, Matrix, MatrixInfo
from headless.data.modality import recognise
from headless.data.readers import faults
from headless.data.readers.names import feature_table
from headless.errors import MosaicError

_DELIMITERS = "\t,;"
#: A preview reads this many lines or bytes, and counts the lines of files up to this size.
_HEAD_LINES, _HEAD_BYTES = 2000, 8_000_000
_COUNTED_BYTES = 200_000_000
_COUNTED_GZIP = 20_000_000
#: Fields parsed at a time.
_BLOCK = 32_000_000
_BARCODE = re.compile(r"(^|[^A-Za-z])[ACGT]{8,}([^A-Za-z]|$)")

Orientation = tuple[bool, str]


@dataclass(frozen=True)
class Head:
    """The first lines of a table, taken apart. ``rows`` holds fields with the row name in front."""

    delimiter: str
    columns: list[str]
    rows: list[list[str]]
    n_bytes: int
    complete: bool

    def orientation(self) -> Orientation:
        """Whether rows are cells, and why."""
        row_names = [row[0] for row in self.rows]
        if _barcodes(self.columns):
            return False, "features x cells: column names look like barcodes"
        if _barcodes(row_names):
            return True, "cells x features: row names look like barcodes"
        across, down = (recognise(names, len(names))[0] for names in (self.columns, row_names))
        if across and not down:
            return True, "cells x features: column names look like features"
        if down and not across:
            return False, "features x cells: row names look like features"
        return True, "cells x features: assumed, nothing in the names tells"


def is_table(path: Path) -> str | None:
    """``csv`` or ``tsv`` if the content is a table of text, else ``None``."""
    try:
        with _open(path) as stream:
            first, second = stream.readline(_HEAD_BYTES), stream.readline(_HEAD_BYTES)
    except UnicodeDecodeError:
        return None
    if "\x00" in first or not first.strip():
        return None
    delimiter = _delimiter(first, second)
    return None if delimiter is None else ("tsv" if delimiter == "\t" else "csv")


def peek(path: Path, format: str) -> FileInfo:
    """Describe a table from its first lines."""
    head = _head(path)
    cells_down, reason = head.orientation()
    n_rows, exact = (len(head.rows), True) if head.complete else _count_rows(path, head)
    row_names = [row[0] for row in head.rows]
    names = head.columns if cells_down else row_names
    n_features = len(head.columns) if cells_down else n_rows
    modality, why = recognise(names, n_features, file_name=path.name)
    about = "" if exact else f"; about {n_rows} rows, judged by the size of the file"
    info = MatrixInfo(
        key="X",
        modality=modality,
        reason=f"{why}; {reason}{about}",
        n_cells=n_rows if cells_down else len(head.columns),
        n_features=n_features,
        layer="X",
        layer_reason="the only matrix of the format",
        layers=("X",),
        counts=judge(_numbers(path, head)),
    )
    return FileInfo(path, format, (info,))


def read(path: Path, format: str, key: str, layer: str, modality: str | None, on_disk: bool) -> Matrix:
    """Read the table in blocks of lines into a sparse matrix; ``on_disk`` has no effect on text."""
    import scipy.sparse as sp

    if key != "X":
        raise faults.no_matrix(path, key, ["X"])
    if layer != "X":
        raise faults.no_layer(path, layer, ["X"])
    head = _head(path)
    cells_down, _ = head.orientation()
    tally = Tally()
    blocks: list[Any] = []
    row_names: list[str] = []
    for names, values in _blocks(path, head):
        row_names += names
        tally.add(values)
        blocks.append(sp.csr_matrix(values.astype(np.float32)))
    x = sp.vstack(blocks, format="csr")
    down, across = np.asarray(row_names, dtype=object), np.asarray(head.columns, dtype=object)
    barcodes, features = (down, across) if cells_down else (across, down)
    x = sp.csr_matrix(x if cells_down else x.T)
    if modality is None:
        modality, reason = recognise(features.tolist(), len(features), file_name=path.name)
        if modality is None:
            raise faults.unknown_modality(path, key, reason)
    if not is_counts(tally.verdict):
        raise refuse(tally.verdict, path, modality, layer)
    obs = pd.DataFrame(index=pd.Index(barcodes))
    return Matrix(x, barcodes, feature_table(features, {}, modality), obs, modality, f"{path.name}:{key}")


def names_of(path: Path) -> NDArray[np.object_]:
    """The first field of every line of a file of names."""
    with _open(path) as stream:
        lines = [re.split(r"[\t,]", line.rstrip("\r\n"))[0].strip('"') for line in stream if line.strip()]
    return np.asarray(lines, dtype=object)


def _open(path: Path) -> IO[str]:
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    if zipped:
        return cast(IO[str], gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def _delimiter(*lines: str) -> str | None:
    counts = {mark: min(line.count(mark) for line in lines if line) for mark in _DELIMITERS}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else None


def _head(path: Path) -> Head:
    lines: list[str] = []
    n_bytes = 0
    complete = True
    with _open(path) as stream:
        for line in stream:
            if len(lines) > _HEAD_LINES or (n_bytes > _HEAD_BYTES and len(lines) > 20):
                complete = False
                break
            lines.append(line)
            n_bytes += len(line)
    lines = [line for line in lines if line.strip()]
    if len(lines) < 2:
        raise faults.empty(path, "has no rows of numbers")
    delimiter = _delimiter(lines[0], lines[1]) or ","
    table = list(csv.reader(lines, delimiter=delimiter))
    columns = table[0] if len(table[1]) == len(table[0]) + 1 else table[0][1:]
    for number, row in enumerate(table[1:], start=2):
        if len(row) != len(columns) + 1:
            raise _ragged(path, number, len(row), len(columns) + 1)
    return Head(delimiter, columns, table[1:], n_bytes - len(lines[0]), complete)


def _numbers(path: Path, head: Head) -> NDArray[np.float64]:
    for number, row in enumerate(head.rows, start=2):
        try:
            [float(field) for field in row[1:]]
        except ValueError:
            raise _words(path, head, number, row) from None
    return np.asarray([[float(field) for field in row[1:]] for row in head.rows])


def _count_rows(path: Path, head: Head) -> tuple[int, bool]:
    """Rows below the header, and whether they were counted or only judged by the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    if size > (_COUNTED_GZIP if zipped else _COUNTED_BYTES):
        # gzip shrinks tables of counts about eightfold
        return round((size * (8 if zipped else 1)) / (head.n_bytes / len(head.rows))), False
    lines, last = 0, b"\n"
    with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
        while block := stream.read(1 << 22):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines - 1 + (last != b"\n"), True


def _blocks(path: Path, head: Head) -> Any:
    """Row names and values, block by block. Whatever is no number is looked up again and named with its line."""
    n_fields = len(head.columns) + 1
    try:
        with _open(path) as stream:
            stream.readline()
            frames = pd.read_csv(
                stream,
                sep=head.delimiter,
                header=None,
                names=range(n_fields),
                index_col=0,
                dtype={0: str},
                chunksize=max(1, _BLOCK // n_fields),
                keep_default_na=False,
                na_values=[],
                low_memory=False,
            )
            for frame in frames:
                values = frame.to_numpy()
                if values.dtype.kind not in "fiu" or (values.dtype.kind == "f" and np.isnan(values).any()):
                    raise ValueError("not a number")
                yield [str(name) for name in frame.index], values
    except ValueError as error:
        raise _explain(path, head) or faults.unreadable(path, str(error)) from error


def _explain(path: Path, head: Head) -> MosaicError | None:
    with _open(path) as stream:
        rows = csv.reader(stream, delimiter=head.delimiter)
        next(rows)
        for row in rows:
            if row and len(row) != len(head.columns) + 1:
                return _ragged(path, rows.line_num, len(row), len(head.columns) + 1)
            try:
                numbers = [float(field) for field in row[1:]]
            except ValueError:
                return _words(path, head, rows.line_num, row)
            if not np.isfinite(numbers).all():
                return _words(path, head, rows.line_num, row)
    return None


def _ragged(path: Path, line: int, found: int, expected: int) -> MosaicError:
    return MosaicError(
        "data.ragged",
        f"{path.name}: line {line} has {found} fields instead of {expected}.",
        "Every line needs a name and one number a column; look for missing or stray separators.",
        file=path,
        line=line,
    )


def _words(path: Path, head: Head, line: int, row: list[str]) -> MosaicError:
    def finite(field: str) -> bool:
        try:
            return bool(np.isfinite(float(field)))
        except ValueError:
            return False

    position = next((i for i, field in enumerate(row[1:]) if not finite(field)), 0)
    value = row[1 + position]
    return MosaicError(
        "data.not_numbers",
        f"{path.name}: line {line}, column '{head.columns[position]}' holds "
        + (f"'{value}', which is no number." if value else "nothing."),
        "Keep counts alone in the table (0 for none); descriptions of cells belong into another file.",
        file=path,
        line=line,
    )


def _barcodes(names: list[str]) -> bool:
    sample = names[:200]
    return bool(sample) and sum(1 for name in sample if _BARCODE.search(name)) >= 0.5 * len(sample)
