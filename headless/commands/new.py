"""``new``: a project from data files."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headless.commands.common import (
    Commands,
    assignments,
    command,
    json_argument,
    mosaic_map,
    print_json,
    project_argument,
    say,
    table,
)
from headless.errors import MosaicError

if TYPE_CHECKING:
    from headless.data.datasets import DatasetRef
    from headless.data.matrix import FileInfo


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "new",
        run,
        "make a project from data files",
        "Make a project that refers to data files (h5mu, h5ad, 10x h5 and mtx, zarr ...). The files are looked at\n"
        "and never changed or copied. What was recognised in each is printed with its reason, then the mosaic:\n"
        "which batch has which modality.",
        """mosaic-headless new study.mosaic --data a.h5mu --data b.h5mu --batch batch --label cell_type
        mosaic-headless new study.mosaic --data day1.h5 --data day2.h5
        mosaic-headless new study.mosaic --data a.h5mu b.h5ad --batch a=donor --batch-name b=blood
        mosaic-headless new study.mosaic --data x.h5ad --modality X=adt --prepare n_top_genes=2000""",
    )
    project_argument(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        type=Path,
        required=True,
        metavar="FILE",
        help="a data file or folder; may be repeated",
    )
    for option, what in (
        ("--batch", "column of obs that holds the batch of each cell (without it: a column of a usual name)"),
        ("--batch-name", "the whole file is one batch of this name"),
        ("--label", "column of obs that holds cell types, for evaluation only (likewise)"),
    ):
        parser.add_argument(
            option,
            action="append",
            default=[],
            metavar="[FILE=]NAME",
            help=f"{what}; FILE= (its name without ending) restricts it to one file",
        )
    parser.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="KEY=MODALITY",
        help="overrule recognition of a matrix: rna, adt, atac or skip",
    )
    parser.add_argument(
        "--prepare",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the preparation, for example n_top_genes=2000",
    )
    parser.add_argument("--preparation", metavar="PRESET", help="a preset of the preparation: paper, everything")
    parser.add_argument("--name", help="name of the study (default: that of the file)")
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Make the project."""
    from headless import project as projects
    from headless.data.preparation import Preparation
    from headless.data.sketch import sketch

    if args.project.exists():
        raise MosaicError(
            "project.exists", f"{args.project.name} exists already.", "Choose another name.", file=args.project
        )
    preparation = Preparation.make(args.preparation, **assignments(args.prepare, "--prepare"))
    base = args.project.parent
    refs: list[DatasetRef] = []
    infos: list[FileInfo] = []
    for path in args.data:
        ref, info = _refer(path, args, [other.id for other in refs])
        refs.append(ref)
        infos.append(info)
    pattern = sketch(refs, base)
    projects.new(args.project, args.name, refs, preparation)
    if args.json:
        print_json({"project": args.project, "datasets": refs, "pattern": pattern})
        return 0
    for ref, info in zip(refs, infos, strict=True):
        _describe(ref, info)
    say(f"\nmosaic (cells x features, before preparation), {sum(pattern.n_cells.values())} cells:")
    say(mosaic_map(pattern))
    if len(groups := pattern.bridges()) > 1:
        shown = "; ".join(", ".join(sorted(group)) for group in groups)
        say(f"  No modality connects these groups of batches: {shown}.")
    say(f"\n{args.project} is made. Next: mosaic-headless add {args.project} --model midas --name first")
    return 0


def _refer(path: Path, args: argparse.Namespace, taken: Collection[str]) -> tuple[DatasetRef, FileInfo]:
    """Look at a file and refer to it as the options say."""
    from headless.data.propose import propose
    from headless.data.read import peek

    column, name, label = (_for_file(path, args.data, given) for given in (args.batch, args.batch_name, args.label))
    if column is not None and name is not None:
        raise MosaicError(
            "usage.batch",
            "Both a batch column and the name of a batch are given.",
            "Give one of them, or say which file each is for: --batch a=donor --batch-name b=blood.",
            field="batch",
            file=path,
        )
    info = peek(path)
    present = {matrix.key for matrix in info.matrices}
    decided = {key: str(value) for key, value in assignments(args.modality, "--modality").items()}
    modalities = {key: None if value == "skip" else value for key, value in decided.items() if key in present}
    ref = propose(info, args.project.parent, "" if name is not None else column, label, modalities=modalities)
    identity, number = ref.id, 1
    while identity in taken:
        number += 1
        identity = f"{ref.id}-{number}"
    own = None if ref.batch_column else name or identity
    return ref.model_copy(update={"id": identity, "batch_name": own}), info


def _describe(ref: DatasetRef, info: FileInfo) -> None:
    say(f"{ref.path} ({ref.format})")
    kept = {item.key: item for item in ref.matrices}
    rows = []
    for matrix in info.matrices:
        item = kept.get(matrix.key)
        rows.append(
            [
                matrix.key,
                item.modality if item else "left out",
                f"{matrix.n_cells} x {matrix.n_features}",
                f"{matrix.layer} ({matrix.counts})",
                item.reason if item else matrix.reason,
            ]
        )
    say(table(rows, ["matrix", "modality", "cells x features", "counts in", "because"]))
    column = next((item for item in info.obs_columns if item.name == ref.batch_column), None)
    if column is not None:
        count = "" if column.n_levels is None else f", {column.n_levels} values: {', '.join(column.examples)}"
        say(f"  batches: column {column.name!r}{count}")
    else:
        say(f"  batches: one, named {ref.batch_name!r} (a column: --batch NAME)")
    if ref.label_column:
        say(f"  labels: column {ref.label_column!r}, for evaluation only")


def _for_file(path: Path, files: Sequence[Path], given: Sequence[str]) -> str | None:
    """What an option says of a file: ``FILE=NAME`` for this one, else ``NAME`` for all; ``None``: nothing."""
    general: str | None = None
    for item in given:
        left, equals, right = item.partition("=")
        named = [other for other in files if equals and left in (other.name, other.name.partition(".")[0])]
        if path in named:
            return right
        if named:
            continue
        if general is not None:
            raise MosaicError(
                "usage.twice",
                f"{general!r} and {item!r} are both given to all files.",
                "Say which file each is for: FILE=NAME.",
            )
        general = item
    return general
