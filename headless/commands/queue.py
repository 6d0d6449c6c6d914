"""``queue``: what waits, in which order, and everything that can be asked of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from headless.commands.common import (
    Commands,
    assignments,
    command,
    json_argument,
    names_list,
    note,
    print_json,
    project_argument,
    say,
    table,
)
from headless.errors import MosaicError

_Call = Callable[[argparse.Namespace], int]
_EXAMPLES = """mosaic-headless queue list study.mosaic
        mosaic-headless queue hold study.mosaic first-2
        mosaic-headless queue move study.mosaic first-3 --to 1
        mosaic-headless queue after study.mosaic second-1 first-1
        mosaic-headless queue retry study.mosaic first-1 --set lr=3e-4
        mosaic-headless queue remove study.mosaic first-2
        mosaic-headless queue undo study.mosaic"""


def add(commands: Commands) -> None:
    """Describe the commands."""
    parser = command(
        commands,
        "queue",
        _list,
        "look at the queue of runs and change it",
        "Look at the queue and change it, also while another program runs it. Nothing is started here: the program\n"
        "that runs the queue does that, or mosaic-headless resume. Runs are named by their id (see queue list), or by\n"
        "their experiment for its newest run.",
        _EXAMPLES,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, call: _Call, text: str, example: str) -> argparse.ArgumentParser:
        made = command(actions, name, call, text, text[0].upper() + text[1:] + ".", f"mosaic-headless queue {example}")
        project_argument(made)
        json_argument(made)
        return made

    action("list", _list, "show what runs and what waits, in order, and why", "list study.mosaic --json")

    made = action("add", _add, "put runs at the end of the queue", "add study.mosaic first-2")
    _runs(made)

    _runs(action("hold", _hold, "do not start runs until they are released", "hold study.mosaic first-2 first-3"))
    _runs(action("release", _release, "let runs that are held be started", "release study.mosaic first-2"))

    made = action("move", _move, "change the order", "move study.mosaic first-3 --to 1")
    _runs(made, several=False)
    made.add_argument("--to", type=int, default=1, metavar="PLACE", help="1 = next (default), -1 = last")

    made = action(
        "after", _after, "start a run only when others are done", "after study.mosaic second-1 first-1 first-2"
    )
    _runs(made, several=False)
    made.add_argument("others", nargs="*", metavar="OTHER", help="what it waits for (none: it waits for no run)")

    made = action("pause", _pause, "start nothing more", "pause study.mosaic --active")
    made.add_argument("--active", action="store_true", help="also let the active run save and pause")

    action("resume", _resume, "start runs again after queue pause", "resume study.mosaic")

    made = action("on-error", _on_error, "what happens after a run that failed", "on-error study.mosaic stop")
    made.add_argument("mode", choices=("continue", "stop"), help="go on with the next run (as at first), or pause")

    made = action(
        "retry",
        _retry,
        "carry a run out again: the same one from its last checkpoint, or a changed one as a new run",
        "retry study.mosaic first-1 --set lr=3e-4",
    )
    _runs(made, several=False)
    _changes(made)
    made.add_argument(
        "--advised",
        action="store_true",
        help="answer the failure: out of memory = half the minibatch, from the start; diverged = a third of the rate, "
        "from the last good checkpoint",
    )

    made = action("duplicate", _duplicate, "a new run like another one", "duplicate study.mosaic first-1 --set lr=3e-4")
    _runs(made, several=False)
    _changes(made)

    _runs(action("remove", _remove, "put runs into the trash", "remove study.mosaic first-2"))

    made = action("undo", _undo, "take a run out of the trash, to where it was", "undo study.mosaic first-2")
    made.add_argument("run", nargs="?", metavar="RUN", help="which (default: the one thrown away last)")

    action("empty", _empty, "delete the runs in the trash for good", "empty study.mosaic")


def _runs(parser: argparse.ArgumentParser, several: bool = True) -> None:
    if several:
        parser.add_argument("runs", nargs="+", metavar="RUN", help="id of a run, or an experiment for its newest run")
    else:
        parser.add_argument("run", metavar="RUN", help="id of a run, or an experiment for its newest run")


def _changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="FIELD=VALUE",
        help="a setting, seed or device that differs; may be repeated",
    )


def _list(args: argparse.Namespace) -> int:
    from headless.commands.status import describe
    from headless.jobs import trash
    from headless.jobs.runfolder import RunFolder

    with _queue(args) as queue:
        state = queue.state
        reasons = queue.obstacles()
        active = queue.active
        thrown = trash.thrown(queue.folder)
        shown = [(name, "") for name in ([active.id] if active else [])] + list(reasons.items())
        rows: list[dict[str, Any]] = []
        for place, (name, reason) in enumerate(shown, start=0 if active else 1):
            known = queue.status_of(name)
            row = describe(RunFolder(queue.folder / name)) if known else {"run": name, "status": "gone"}
            rows.append({"place": place, **row, "waits": reason, "after": list(state.after.get(name, ()))})
        other = queue.in_the_way
    if args.json:
        print_json(
            {
                "paused": state.paused, "remark": state.remark, "on_error": state.on_error, "runs": rows,
                "trash": thrown, "scheduler": other.message if other else None,
            }
        )  # fmt: skip
        return 0
    if state.paused:
        say(f"The queue is paused: {state.remark}.")
    if other is not None:
        say(other.message)
    if rows:
        words = [
            [row["place"] or "", row["run"], row["status"], _varied(row), row["waits"] or row.get("detail", "")]
            for row in rows
        ]
        say(table(words, ["", "run", "state", "", ""]))
    else:
        say("Nothing runs and nothing waits.")
    say(f"after an error: {state.on_error}" + (f"; in the trash: {', '.join(thrown)}" if thrown else ""))
    return 0


def _add(args: argparse.Namespace) -> int:
    with _queue(args) as queue:
        for run in _named(args, args.runs):
            if run.status in ("done", "cancelled"):
                raise MosaicError("run.not_resumable", f"{run.id} is {run.status}.", "Use queue retry.", run=run.id)
            queue.add(run)
        return _done(args, queue)


def _hold(args: argparse.Namespace) -> int:
    return _each(args, lambda queue, run: queue.hold(run))


def _release(args: argparse.Namespace) -> int:
    return _each(args, lambda queue, run: queue.release(run))


def _remove(args: argparse.Namespace) -> int:
    return _each(args, lambda queue, run: queue.remove(run))


def _move(args: argparse.Namespace) -> int:
    if args.to == 0:
        raise MosaicError("usage.place", "Places are 1, 2, ... or -1 for the last.", field="to")
    with _queue(args) as queue:
        queue.move(_named(args, [args.run])[0].id, args.to - 1 if args.to > 0 else args.to)
        return _done(args, queue)


def _after(args: argparse.Namespace) -> int:
    with _queue(args) as queue:
        run, *others = (item.id for item in _named(args, [args.run, *args.others]))
        queue.after(run, *others)
        return _done(args, queue)


def _pause(args: argparse.Namespace) -> int:
    with _queue(args) as queue:
        queue.pause()
        if args.active and queue.active is not None:
            queue.active.ask("pause")
        return _done(args, queue)


def _resume(args: argparse.Namespace) -> int:
    with _queue(args) as queue:
        queue.resume()
        code = _done(args, queue)
        if queue.scheduler and not args.json:
            say(f"Nobody runs the queue now; start it with: mosaic-headless resume {args.project}")
        return code


def _on_error(args: argparse.Namespace) -> int:
    with _queue(args) as queue:
        queue.on_error(args.mode)
        return _done(args, queue)


def _retry(args: argparse.Namespace) -> int:
    from headless.jobs.retry import advised

    changes = assignments(args.changes, "--set")
    if args.advised and changes:
        raise MosaicError("usage.retry", "--advised says what is changed; --set cannot be given too.", field="set")
    with _queue(args) as queue:
        run = _named(args, [args.run])[0]
        if args.advised:
            made = advised(run)
            queue.add(made)
        else:
            made = queue.retry(run, changes)
        return _done(args, queue, made.id, made.request.reason if made.id != run.id else "from its last checkpoint")


def _duplicate(args: argparse.Namespace) -> int:
    with _queue(args) as queue:
        made = queue.duplicate(_named(args, [args.run])[0], assignments(args.changes, "--set"))
        return _done(args, queue, made.id, made.request.reason)


def _undo(args: argparse.Namespace) -> int:
    with _queue(args) as queue:
        return _done(args, queue, queue.undo(args.run), "is back")


def _empty(args: argparse.Namespace) -> int:
    from headless.jobs import trash

    with _queue(args) as queue:
        count, size = len(trash.thrown(queue.folder)), trash.size(queue.folder)
        queue.empty_trash()
        return _done(args, queue, words=f"{count} runs, {size / 1e6:.1f} MB deleted")


def _each(args: argparse.Namespace, do: Callable[[Any, str], None]) -> int:
    with _queue(args) as queue:
        for run in _named(args, args.runs):
            do(queue, run.id)
        return _done(args, queue)


def _queue(args: argparse.Namespace) -> Any:
    from headless import project as projects
    from headless.jobs.queue import Queue

    projects.load(args.project, note=note)  # is it a project at all?
    return Queue(args.project)


def _named(args: argparse.Namespace, names: list[str]) -> list[Any]:
    from headless.jobs.runfolder import find_run

    return [find_run(args.project, name) for name in names_list(names)]


def _done(args: argparse.Namespace, queue: Any, run: str | None = None, words: str = "") -> int:
    """Tell what was done, or that the program which runs the queue has not done it yet."""
    taken = queue.settle()
    if args.json:
        print_json({"run": run, "waiting": queue.state.waiting, "taken": taken})
        return 0
    if run is not None or words:
        say(f"{run}: {words}" if run and words else run or words)
    elif queue.state.waiting:
        more = len(queue.state.waiting) - 10
        say(f"waiting: {', '.join(queue.state.waiting[:10])}" + (f" and {more} more" if more > 0 else ""))
    else:
        say("Nothing waits.")
    if not taken and queue.in_the_way is not None:
        note(f"asked for, but not yet done. {queue.in_the_way.message} {queue.in_the_way.hint}".strip())
    return 0


def _varied(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in (row.get("varied") or {}).items())
