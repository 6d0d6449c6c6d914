"""``programs``: what each dimension of an embedding does to genes, proteins and peaks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headless.commands.common import Commands, command, json_argument, note, print_json, project_argument, say, table
from headless.errors import MosaicError

if TYPE_CHECKING:
    import pandas as pd


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "programs",
        run,
        "show what each latent dimension does to every feature",
        "Move one dimension of a trained model from end to end while the others rest, and list the features that\n"
        "rise and fall with it (pseudocell programs, as in scMM). With a GMT file of gene sets, say which sets the\n"
        "lists of genes are rich in. A run that was not asked for programs is asked now, from its saved model.",
        """mosaic-headless programs study.mosaic --run first
        mosaic-headless programs study.mosaic --run first --dimension 3 --top 20
        mosaic-headless programs study.mosaic --run first --gene-sets hallmark.gmt
        mosaic-headless programs study.mosaic --run first --to programs""",
    )
    project_argument(parser)
    parser.add_argument("--run", required=True, metavar="NAME", help="a run id, or an experiment for its newest run")
    parser.add_argument("--dimension", type=int, action="append", metavar="N", help="only this one; may be repeated")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="features shown of each list (default: 8)")
    parser.add_argument("--gene-sets", type=Path, metavar="FILE", help="a GMT file of gene sets")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write the whole tables there (csv)")
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Show the programs of a run."""
    from headless import project as projects
    from headless.commands.evaluate import must_have_results
    from headless.jobs.runfolder import find_run

    projects.load(args.project, note=note)
    found = find_run(args.project, args.run)
    must_have_results(found)
    tables = _tables(found.results)
    sets = None
    if args.gene_sets is not None:
        from headless.tasks.enrichment import program_enrichment

        if "rna" not in tables:
            raise MosaicError("usage.gene_sets", "Gene sets need RNA, and this run has none.", field="gene-sets")
        sets = program_enrichment(tables["rna"], args.gene_sets)
    if args.to is not None:
        _write(args.to, tables, sets)
    wanted = {m: _chosen(own, args.dimension) for m, own in tables.items()}
    sets = None if sets is None else _chosen(sets, args.dimension)
    if args.json:
        shown: dict[str, Any] = {m: _lists(own, args.top) for m, own in wanted.items()}
        print_json({"run": found.id, "programs": shown, "gene_sets": None if sets is None else _best(sets, args.top)})
        return 0
    say(f"{found.id}: features that rise (+) and fall (-) along each dimension, the strongest first")
    for dimension in next(iter(wanted.values()))["dimension"].unique():
        say(f"\ndimension {dimension}")
        rows = []
        for m, own in wanted.items():
            lists = _lists(own[own["dimension"] == dimension], args.top)[str(dimension)]
            rows += [[m, "+", ", ".join(lists["up"]) or "none"], [m, "-", ", ".join(lists["down"]) or "none"]]
        if sets is not None:
            for row in _best(sets[sets["dimension"] == dimension], args.top):
                sign = "+" if row["direction"] == "up" else "-"
                rows.append(["gene set", sign, f"{row['set']} (q = {row['q']:.2g})"])
        say(table(rows, ["", "", ""]))
    return 0


def _tables(results: Path) -> Mapping[str, pd.DataFrame]:
    """The stored programs of a run, or those of its saved model."""
    from headless.results import Results

    read = Results(results)
    stored = read.index.get("programs", {}).get("modalities")
    if stored:
        return {m: read.programs(m) for m in stored}
    from headless.models.store import load_model
    from headless.tasks.programs import programs

    return programs(load_model(results / "model")).tables


def _chosen(own: pd.DataFrame, dimensions: list[int] | None) -> pd.DataFrame:
    if dimensions is None:
        return own
    known = set(own["dimension"])
    for number in dimensions:
        if number not in known:
            raise MosaicError(
                "usage.dimension",
                f"There is no dimension {number}.",
                f"There are 1 to {max(known)}.",
                field="dimension",
            )
    return own[own["dimension"].isin(dimensions)]


def _lists(own: pd.DataFrame, top: int) -> dict[str, dict[str, list[str]]]:
    """Dimension -> the best features of its two lists."""
    found = {}
    for dimension, rows in own.groupby("dimension", sort=True):
        found[str(dimension)] = {
            way: rows[rows[f"rank_{way}"].notna()].sort_values(f"rank_{way}")["feature"].head(top).tolist()
            for way in ("up", "down")
        }
    return found


def _best(sets: pd.DataFrame, top: int) -> list[dict[Any, Any]]:
    """Sets that are found more often than by chance (q below 5 %), the surest first."""
    return sets[sets["q"] < 0.05].sort_values("q").head(top).to_dict("records")


def _write(folder: Path, tables: Mapping[str, pd.DataFrame], sets: pd.DataFrame | None) -> None:
    from headless.errors import from_os_error

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for m, own in tables.items():
            own.to_csv(folder / f"{m}.csv", index=False, lineterminator="\n")
        if sets is not None:
            sets.to_csv(folder / "gene_sets.csv", index=False, lineterminator="\n")
    except OSError as error:
        raise from_os_error(error, folder, "write the programs") from error
    note(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
