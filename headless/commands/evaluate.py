"""``evaluate``: the scores of a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from headless.commands.common import Commands, command, json_argument, note, print_json, project_argument, say
from headless.errors import MosaicError

if TYPE_CHECKING:
    from headless.jobs.runfolder import RunFolder


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "evaluate",
        run,
        "show the scores of a run",
        "Show how well a run integrates (with labels: scIB scores) and imputes (with a holdout: against hidden values\n"
        "and baselines). A run is scored when it ends; --again scores it anew from its results and the data.",
        """mosaic-headless evaluate study.mosaic --run first
        mosaic-headless evaluate study.mosaic --run first-2 --json
        mosaic-headless evaluate study.mosaic --run first --again""",
    )
    project_argument(parser)
    parser.add_argument("--run", required=True, metavar="NAME", help="a run id, or an experiment for its newest run")
    parser.add_argument("--again", action="store_true", help="compute the scores anew")
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Show the scores."""
    from headless import project as projects
    from headless.jobs.runfolder import find_run
    from headless.results import Results

    projects.load(args.project, note=note)
    found = find_run(args.project, args.run)
    must_have_results(found)
    if args.again or not (found.results / "metrics.json").exists():
        _score(found)
    metrics = Results(found.results).metrics
    if args.json:
        print_json({"run": found.id, "metrics": metrics})
        return 0
    say(f"{found.id}:")
    for line in _lines(metrics, 1):
        say(line)
    return 0


def must_have_results(run: RunFolder) -> None:
    """Refuse a run without complete results. Raises ``run.no_result``."""
    if not (run.results / "index.json").exists():
        status = run.status
        hint = "Wait until it is done." if status == "running" else "Run it first: mosaic-headless run STUDY"
        raise MosaicError("run.no_result", f"{run.id} is {status} and has no results yet.", hint, run=run.id)


def _score(run: RunFolder) -> None:
    """Score as the worker does, from the results and the data, while no worker is at the run."""
    from headless.data.build import build_mosaic
    from headless.data.holdout import choose
    from headless.evaluate import score_run
    from headless.jobs.worker import worker_lock

    request = run.request
    with worker_lock(run):
        truth = build_mosaic(request.datasets, request.preparation, run.base)
        score_run(run.results, truth, choose(truth, request.holdout))


def _lines(values: Mapping[str, Any], depth: int) -> Iterator[str]:
    pad = "  " * depth
    for name, value in values.items():
        if isinstance(value, Mapping):
            if value:
                yield f"{pad}{name}"
                yield from _lines(value, depth + 1)
        elif isinstance(value, float):
            yield f"{pad}{name}: {value:.4g}"
        elif isinstance(value, list):
            yield f"{pad}{name}: {', '.join(map(str, value))}"
        else:
            yield f"{pad}{name}: {'not available' if value is None else value}"
