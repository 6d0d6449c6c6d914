"""``evaluate``: the scores of a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from headless.commands.common import Commands, command, json_argument, note, print_json, project_argument, say, table
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
    for line in _tables(metrics):
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


def _tables(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The scores beside those of the baselines; what could not be computed with its reason."""
    baselines = metrics.get("baselines", {})
    yield from _table("integration (scIB, 0 to 1, higher is better)", metrics.get("scib"), baselines.get("scib"))
    for pair, values in metrics.get("alignment", {}).items():
        yield from _table(f"alignment of {pair}", {"model": values}, None)
    for modality, columns in metrics.get("imputation", {}).items():
        yield from _table(
            f"imputation of {modality}, values hidden from training",
            columns,
            baselines.get("imputation", {}).get(modality),
        )
    for what, reason in (metrics.get("absent") or {}).items():
        yield f"\nno {what}: {reason}"


def _table(title: str, model: Mapping[str, Any] | None, baselines: Mapping[str, Any] | None) -> Iterator[str]:
    columns = {**(model or {}), **(baselines or {})}
    if not columns:
        return
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [[name, *(_number(values.get(name)) for values in columns.values())] for name in names]
    yield f"\n{title}"
    yield table(rows, ["", *columns])
    reasons = {name: item["reason"] for name, item in (model or {}).get("model", {}).items() if item.get("reason")}
    for name, reason in reasons.items():
        yield f"  no {name}: {reason}"


def _number(item: Mapping[str, Any] | None) -> str:
    value = (item or {}).get("value")
    return "-" if value is None else f"{value:.3f}"
