"""``status``: what was run, what runs, what waits. Reads only."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from headless.commands.common import Commands, command, json_argument, note, print_json, project_argument, say, table
from headless.commands.words import ended_words, epoch_words, progress_words
from headless.errors import MosaicError

if TYPE_CHECKING:
    from headless.jobs.runfolder import RunFolder, State


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "status",
        run,
        "show the runs of a project",
        "Show the data, the experiments and the runs of a project and how far they are. Works while runs are running.",
        """mosaic-headless status study.mosaic
        mosaic-headless status study.mosaic --json""",
    )
    project_argument(parser)
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Show the runs."""
    from headless import project as projects
    from headless.jobs.runfolder import list_runs

    project = projects.load(args.project, note=note)
    rows = [describe(item) for item in list_runs(args.project)]
    waiting = [item.name for item in project.experiments if item.name not in {row["experiment"] for row in rows}]
    if args.json:
        print_json({"project": project.name, "datasets": project.datasets, "not_run": waiting, "runs": rows})
        return 0
    counts = ((project.datasets, "data set"), (project.experiments, "experiment"), (rows, "run"))
    say(
        f"{project.name}: "
        + ", ".join(f"{len(items)} {what}{'' if len(items) == 1 else 's'}" for items, what in counts)
    )
    if rows:
        shown = [[row[key] for key in ("run", "experiment", "model", "status")] + [_words(row)] for row in rows]
        say(table(shown, ["run", "experiment", "model", "state", ""]))
    if waiting:
        say(f"not run yet: {', '.join(waiting)}")
    return 0


def describe(run: RunFolder) -> dict[str, Any]:
    """One run as plain values; a damaged one is told, not raised."""
    try:
        request, state = run.request, run.state
    except MosaicError as error:
        return {
            "run": run.id, "experiment": "", "model": "", "status": "damaged", "phase": "", "detail": str(error),
            "error": error.as_dict(), "updated": "", "epoch": None, "varied": {},
        }  # fmt: skip
    status, epoch = state.seen, run.last("epoch")
    return {
        "run": run.id,
        "experiment": request.experiment,
        "model": request.model,
        "seed": request.seed,
        "status": status,
        "phase": state.phase,
        "detail": _detail(run, state, status, epoch),
        "error": state.error if status == "failed" else None,
        "updated": state.updated,
        "epoch": epoch,
        "attempts": state.attempts,
        "varied": request.varied,
        "origin": request.origin,
        "reason": request.reason,
    }


def _words(row: dict[str, Any]) -> str:
    """What tells a run from the others of its sweep, and how far it is; of a done one the last loss."""
    parts = [", ".join(f"{name} = {value}" for name, value in (row.get("varied") or {}).items())]
    if row.get("varied") and row["status"] == "done" and row["epoch"]:
        parts.append(epoch_words(row["epoch"]))
    return "; ".join(part for part in (*parts, row["detail"]) if part)


def _detail(run: RunFolder, state: State, status: str, epoch: dict[str, Any] | None) -> str:
    if status == "running":
        progress = run.last("progress", within=4096)
        now = epoch_words(epoch) if state.phase == "train" and epoch else progress_words(progress) if progress else ""
        where = f" on {state.process.host}" if state.process and not state.process.here else ""
        return f"{state.phase}{': ' + now if now else ''}{where}"
    if status == "interrupted" and state.status == "running":
        return f"the worker ended without a word during {state.phase or 'its start'}"
    return ended_words({"status": "", "remark": state.remark}).removeprefix(": ")
