"""``run``, ``resume`` and ``worker``: start experiments, go on with them, carry one out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headless.commands.common import (
    Commands,
    command,
    json_argument,
    listed,
    names_list,
    note,
    project_argument,
    say,
    texts,
)
from headless.errors import MosaicError

if TYPE_CHECKING:
    from headless.jobs.queue import Queue
    from headless.jobs.runfolder import RunFolder
    from headless.project import Experiment, Project


def add(commands: Commands) -> None:
    """Describe the commands."""
    parser = command(
        commands,
        "run",
        run,
        "run the experiments of a project",
        "Run the experiments one after the other, each in a process and a folder of its own (runs/ beside the\n"
        "project). What was done already is not repeated; what was paused or interrupted goes on from its last\n"
        "checkpoint. "
        "Ctrl-C saves and pauses. The run goes on if this program is closed or killed. While another program\n"
        "runs the queue of the project, the runs are put into that queue and watched.\n"
        "With --repeat N and --sweep an experiment becomes many runs: every combination of seeds and values.",
        """mosaic-headless run study.mosaic
        mosaic-headless run study.mosaic --only first --device cpu
        mosaic-headless run study.mosaic --only first --repeat
        mosaic-headless run study.mosaic --repeat 3 --sweep lr=1e-3,2e-3
        mosaic-headless run study.mosaic --retry-memory --retry-diverged
        mosaic-headless run study.mosaic --json > events.jsonl""",
    )
    project_argument(parser)
    parser.add_argument("--only", action="append", metavar="NAMES", help="experiments to run (default: all)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N instead of what the experiments say")
    parser.add_argument(
        "--repeat",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="with a number: so many random seeds, the experiment's and the next ones; without: run again what was "
        "done already",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=A,B",
        help="a run for every value of a setting (or of seed, preset, model); may be repeated",
    )
    parser.add_argument(
        "--retry-memory",
        action="store_true",
        help="out of memory: again from the start with half the minibatch (the effective minibatch is halved too)",
    )
    parser.add_argument(
        "--retry-diverged",
        action="store_true",
        help="diverged: again from the last good checkpoint with a third of the rate",
    )
    json_argument(parser, "print every event as a line of JSON")

    parser = command(
        commands,
        "resume",
        resume,
        "go on with runs that were paused, interrupted or failed",
        "Go on with runs from their last checkpoint: the same run, the same result as if nothing had happened.",
        """mosaic-headless resume study.mosaic
        mosaic-headless resume study.mosaic --run first
        mosaic-headless resume study.mosaic --run first-2 --json""",
    )
    project_argument(parser)
    parser.add_argument(
        "--run",
        action="append",
        metavar="NAMES",
        help="run ids, or experiments for their newest run (default: all that wait)",
    )
    json_argument(parser, "print every event as a line of JSON")

    parser = command(
        commands,
        "worker",
        worker,
        "carry out one run folder (what run, the window and clusters start)",
        "Carry out a run folder in this process and end: 0 done, 12 paused or interrupted, otherwise the code of the\n"
        "error. "
        "Nothing is printed; what happens is in events.jsonl and log.txt of the folder.",
        "mosaic-headless worker runs/first-1",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run folder")
    json_argument(parser, "print errors as JSON")


def run(args: argparse.Namespace) -> int:
    """Start or go on with experiments and follow them."""
    from headless import project as projects
    from headless.commands.follow import follow
    from headless.jobs.queue import Queue

    project = projects.load(args.project, note=note)
    only = names_list(args.only)
    experiments = [project.experiment(name) for name in only] or list(project.experiments)
    if not experiments:
        raise MosaicError(
            "usage.no_experiment",
            "The project has no experiment.",
            f"Add one: mosaic-headless add {args.project} --model midas --name first",
        )
    if not project.datasets:
        raise MosaicError("project.no_data", "The project has no data.", "Make it with --data FILE.", field="datasets")
    wanted = _expanded(args, experiments)
    with Queue(args.project) as queue:
        runs = []
        known = _known(args, project)
        for experiment, varied in wanted:
            found = _find_or_make(args, project, experiment, varied, queue, known)
            if found is not None:
                queue.add(found)
                runs.append(found)
        queue.serve = {run.id for run in runs}  # what an earlier command left waiting keeps its place
        return follow(queue, runs, args.json) if runs else 0


def resume(args: argparse.Namespace) -> int:
    """Go on with runs and follow them."""
    from headless import project as projects
    from headless.commands.follow import follow
    from headless.jobs.queue import Queue
    from headless.jobs.runfolder import RESUMABLE, find_run, list_runs

    projects.load(args.project, note=note)  # is it a project at all?
    names = names_list(args.run)
    with Queue(args.project) as queue:
        active = queue.active.id if queue.active else None
        if names:
            runs = [find_run(args.project, name) for name in names]
        else:
            waits = ("queued", "paused", "interrupted")
            runs = [run for run in list_runs(args.project) if run.status in waits or run.id == active]
        for run in runs:
            if run.id != active and run.status not in RESUMABLE:
                raise MosaicError(
                    "run.not_resumable",
                    f"{run.id} is {run.status}.",
                    "Start it anew: mosaic-headless run STUDY --repeat",
                    run=run.id,
                )
            queue.add(run)
            if names and run.id in queue.state.held:
                queue.release(run.id)
        if names:
            queue.serve = {run.id for run in runs}
        if not runs and not args.json:
            say("Nothing waits to go on.")
        return follow(queue, runs, args.json) if runs else 0


def worker(args: argparse.Namespace) -> int:
    """Carry out one run."""
    from headless.jobs.worker import execute

    return execute(args.folder)


def _on(experiment: Experiment, device: str) -> Experiment:
    """The experiment with another wish for a device."""
    from pydantic import ValidationError

    from headless.schema import from_validation

    try:
        return type(experiment).model_validate({**experiment.model_dump(), "device": device})
    except ValidationError as error:
        raise from_validation(error, "usage.device") from None


def _expanded(args: argparse.Namespace, experiments: Sequence[Experiment]) -> list[tuple[Experiment, dict[str, Any]]]:
    """The experiments, each as all the runs of its sweep, with what tells those apart."""
    from headless.jobs.sweep import expand

    values = {name: listed(text) for name, text in texts(args.sweep, "--sweep").items()}
    if args.repeat is not None and args.repeat < 0:
        raise MosaicError("usage.sweep", "The number of seeds cannot be negative.", field="repeat")
    made = []
    for experiment in experiments:
        wanted = _on(experiment, args.device) if args.device else experiment
        made += expand(wanted, values, args.repeat or 1)
    return made


def _known(args: argparse.Namespace, project: Project) -> dict[tuple[str, str], list[RunFolder]]:
    """The runs that there are, oldest first, by experiment and content."""
    from headless.jobs.runfolder import list_runs

    found: dict[tuple[str, str], list[RunFolder]] = {}
    for run in list_runs(args.project):
        request = run.request
        if args.device in (None, request.device):
            found.setdefault((request.experiment, request.content), []).append(run)
    return found


def _find_or_make(
    args: argparse.Namespace,
    project: Project,
    experiment: Experiment,
    varied: dict[str, Any],
    queue: Queue,
    known: dict[tuple[str, str], list[RunFolder]],
) -> RunFolder | None:
    """The run to carry out: the newest one of the same content if it is not over, else a new one.

    ``None`` if it was done already and is not to be repeated.
    """
    from headless.jobs.retry import advised, family_of, last_retry
    from headless.jobs.runfolder import RESUMABLE, RunFolder, request_of

    wanted = {"memory": args.retry_memory, "diverged": args.retry_diverged}
    on_failure = tuple(family for family, asked in wanted.items() if asked)
    request = request_of(project, experiment)
    same = known.get((experiment.name, request.content))
    if same and args.repeat != 0:
        newest = last_retry(same[-1])
        status = newest.status
        if queue.active is not None and queue.active.id == newest.id:
            return newest
        if status == "running":
            raise MosaicError(
                "run.already_running",
                f"{newest.id} is running already.",
                "Wait for it, or pause it where it was started.",
                run=newest.id,
            )
        if status == "done":
            if not args.json:
                say(f"{newest.id} is done already; --repeat runs it again.")
            return None
        if status == "failed" and family_of(newest) in on_failure:
            again = advised(newest)
            if not args.json:
                say(f"{again.id}: {again.request.reason}")
            return again
        if status in RESUMABLE:
            if not args.json and status != "queued":
                say(f"{newest.id} is {status}: it goes on from its last checkpoint.")
            if not set(on_failure) <= set(newest.request.on_failure):
                note(f"{newest.id} was begun without --retry-...; it goes on as it was begun")
            return newest
    return RunFolder.create(args.project, project, experiment, varied=varied, on_failure=on_failure)
