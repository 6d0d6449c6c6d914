"""``run``, ``resume`` and ``worker``: start experiments, go on with them, carry one out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from headless.commands.common import Commands, command, json_argument, names_list, note, project_argument, say
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
        "Ctrl-C saves and pauses. The run goes on if this program is closed or killed.",
        """mosaic-headless run study.mosaic
        mosaic-headless run study.mosaic --only first --device cpu
        mosaic-headless run study.mosaic --only first --repeat
        mosaic-headless run study.mosaic --json > events.jsonl""",
    )
    project_argument(parser)
    parser.add_argument("--only", action="append", metavar="NAMES", help="experiments to run (default: all)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N instead of what the experiments say")
    parser.add_argument("--repeat", action="store_true", help="run again what was done already")
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
    with Queue(args.project) as queue:
        queue.clear()  # what an earlier command left waiting is not what is asked for now
        runs = []
        for experiment in experiments:
            wanted = _on(experiment, args.device) if args.device else experiment
            found = _find_or_make(args, project, wanted, queue)
            if found is None:
                continue
            queue.add(found)
            runs.append(found)
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
        queue.clear()
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


def _find_or_make(args: argparse.Namespace, project: Project, experiment: Experiment, queue: Queue) -> RunFolder | None:
    """The run to carry out: the newest one of the same content if it is not over, else a new one.

    ``None`` if it was done already and is not to be repeated.
    """
    from headless.jobs.runfolder import RESUMABLE, RunFolder, list_runs, request_of

    content = request_of(project, experiment).content
    same = [
        run
        for run in list_runs(args.project)
        if run.request.experiment == experiment.name
        and run.request.content == content
        and args.device in (None, run.request.device)
    ]
    if same and not args.repeat:
        newest = same[-1]
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
        if status in RESUMABLE:
            if not args.json and status != "queued":
                say(f"{newest.id} is {status}: it goes on from its last checkpoint.")
            return newest
    return RunFolder.create(args.project, project, experiment)
