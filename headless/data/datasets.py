"""References to input files: what the project keeps of them instead of their numbers.

An input file is only ever read. A reference holds where it is (relative first, absolute second), a fingerprint to
recognise it after it moved, and what was decided about its matrices.
"""

from __future__ import annotations

from headless.schema import Frozen


class Fingerprint(Frozen):
    """Size in bytes and a SHA-256 over the size and evenly spread blocks of the content (quick on large files).

    For a folder (10x mtx, zarr) the hash runs over the sorted relative names, sizes and the same blocks.
    """

    size: int
    sha256: str


class MatrixRef(Frozen):
    """One matrix of a file, and how it is to be read.

    ``key`` names it inside the file (``mod/adt``, ``X``, ``Antibody Capture`` ...); ``layer`` is where the raw counts
    are (``X``, ``layers/counts``, ``raw/X``); ``reason`` says how the modality was recognised.
    """

    key: str
    modality: str
    layer: str = "X"
    reason: str = ""


class DatasetRef(Frozen):
    """One input file or folder.

    Attributes
    ----------
    id
        Short unique name inside the project, from the file name.
    path, absolute
        Relative to the project's folder (POSIX form), and where it was when it was added.
    batch_column
        Column of obs that holds the batch of each cell; ``None``: the whole file is one batch named ``batch_name``.
    label_column
        Column of obs that holds cell types, for evaluation only; ``None`` if there is none.

    Matrices of the same batch, in one file or several, are joined by barcode.
    """

    id: str
    path: str
    absolute: str
    format: str
    fingerprint: Fingerprint
    matrices: tuple[MatrixRef, ...]
    batch_column: str | None = None
    batch_name: str | None = None
    label_column: str | None = None
