"""``export``: results as a file for other tools."""

from __future__ import annotations

import argparse
from pathlib import Path

from headless.commands.common import (
    Commands,
    command,
    json_argument,
    names_list,
    note,
    print_json,
    project_argument,
    say,
)


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "export",
        run,
        "write the results of a run to a file for other tools",
        "Write the results of a run to one file: .h5mu (all modalities: measured counts, layers, embeddings),\n"
        ".h5ad (one modality) or .csv, .csv.gz (one latent). Layers that the run did not store are computed where\n"
        "possible.",
        """mosaic-headless export study.mosaic --run first --to result.h5mu
        mosaic-headless export study.mosaic --run first --to result.h5mu --layers imputed,corrected
        mosaic-headless export study.mosaic --run first --to rna.h5ad --modality rna --layers imputed/rna
        mosaic-headless export study.mosaic --run first --to embedding.csv""",
    )
    project_argument(parser)
    parser.add_argument("--run", required=True, metavar="NAME", help="a run id, or an experiment for its newest run")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--layers",
        action="append",
        metavar="NAMES",
        help="imputed, corrected, translated, or one modality of them: imputed/rna (default: those that are stored)",
    )
    parser.add_argument("--modality", help="which modality an .h5ad holds")
    parser.add_argument("--latent", help="what a .csv holds (default: the joint embedding)")
    parser.add_argument("--no-counts", action="store_true", help="leave the measured counts out: the data are not read")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--device", default="cpu", help="for layers that are computed (default: cpu)")
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    from headless import project as projects
    from headless.commands.evaluate import must_have_results
    from headless.data.build import build_mosaic
    from headless.data.locate import resolve
    from headless.export import check_target, export
    from headless.jobs.runfolder import find_run
    from headless.results import Results

    projects.load(args.project, note=note)
    found = find_run(args.project, args.run)
    must_have_results(found)
    results, request = Results(found.results), found.request
    inputs = [resolve(ref, found.base, verify=False) for ref in request.datasets] if not args.no_counts else []
    check_target(results, args.to, args.overwrite, inputs)  # before the data are read, which may take a while
    needs_data = not args.no_counts and not args.to.name.endswith((".csv", ".csv.gz"))
    written = export(
        results,
        args.to,
        names_list(args.layers) or None,
        modality=args.modality,
        latent=args.latent,
        mosaic=build_mosaic(request.datasets, request.preparation, found.base) if needs_data else None,
        overwrite=args.overwrite,
        inputs=inputs,
        device=args.device,
    )
    if args.json:
        print_json({"run": found.id, "file": written, "bytes": written.stat().st_size})
    else:
        say(f"{written} ({written.stat().st_size / 1e6:.1f} MB) holds the results of {found.id}")
    return 0
