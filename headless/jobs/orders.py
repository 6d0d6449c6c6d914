"""What the queue knows beside the run folders, and the orders that change it: plain values, no files.

An :class:`Order` is what a user asks of the queue. The scheduler carries it out at once; a watcher leaves it as a file
for the scheduler (:mod:`headless.jobs.queue`). :func:`changed` says what an order does to the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from headless.errors import MosaicError
from headless.lock import ProcessId
from headless.project import nearest
from headless.schema import Frozen

OnError = Literal["continue", "stop"]


class Active(Frozen):
    """The run that a worker is at: the how manieth attempt, since when, and the worker's process once it is known.

    ``launched`` is in seconds since the epoch. It is written before the worker is started: a scheduler that is killed
    in that moment leaves ``process`` empty, and the next one looks for the worker instead of starting a second.
    """

    run: str
    process: ProcessId | None = None
    attempt: int
    launched: float = 0.0


class Trashed(Frozen):
    """A run in the trash, and what it was in the queue (``place`` among the waiting; ``None`` if it did not wait)."""

    run: str
    time: str
    place: int | None = None
    held: bool = False
    after: tuple[str, ...] = ()


class QueueState(Frozen):
    """``queue.json``.

    Attributes
    ----------
    waiting
        Ids of the runs that wait, in order.
    active
        The one that a worker is at.
    held
        Those of the waiting that are not started until they are released.
    after
        Run -> the runs that must be done before it is started.
    paused, remark
        Nothing is started; why, in words.
    on_error
        Does the queue go on (``continue``) or pause itself (``stop``) after a run that failed?
    trash
        The runs in the trash, the last one thrown away last.
    """

    schema_version: int = 1
    waiting: tuple[str, ...] = ()
    active: Active | None = None
    held: tuple[str, ...] = ()
    after: dict[str, tuple[str, ...]] = {}
    paused: bool = False
    remark: str = ""
    on_error: OnError = "continue"
    trash: tuple[Trashed, ...] = ()


class Order(Frozen):
    """Something asked of the queue: ``do`` what with ``run``; ``to``, ``others`` and ``mode`` as far as it needs them.

    ``to`` is a place among the waiting (0 = next; negative ones count from the end).
    """

    do: Literal["add", "move", "hold", "release", "after", "pause", "resume", "on_error", "remove", "undo", "empty"]
    run: str = ""
    to: int | None = None
    others: tuple[str, ...] = ()
    mode: str = ""
    time: str = ""


def changed(state: QueueState, order: Order) -> QueueState:
    """The state after an order.

    Raises
    ------
    MosaicError
        ``run.not_waiting`` (with the nearest name), ``run.active``, ``usage.circle``, ``usage.on_error``.
    """
    made: QueueState = _CHANGES[order.do](state, order)
    return made


def replaced(state: QueueState, run: str, by: str) -> QueueState:
    """A run was begun anew as another one, which stands first and which all wait for that waited for ``run``."""
    after = {
        name: tuple(by if other == run else other for other in others) for name, others in state.after.items()
    }
    waiting = tuple(item for item in state.waiting if item not in (run, by))
    return _with(state, waiting=(by, *waiting), after=after)


def _with(state: QueueState, **changes: Any) -> QueueState:
    """A changed copy that speaks of no hold or dependency of a run that does not wait (any more)."""
    made = state.model_copy(update=changes)
    waiting = set(made.waiting)
    held = tuple(run for run in made.held if run in waiting)
    after = {run: others for run, others in made.after.items() if run in waiting and others}
    return made.model_copy(update={"held": held, "after": after})


def taken(state: QueueState, active: Active) -> QueueState:
    """The state in which a run is carried out."""
    return _with(state, waiting=tuple(run for run in state.waiting if run != active.run), active=active)


def dropped(state: QueueState, runs: Iterable[str]) -> QueueState:
    """The state without some of the waiting."""
    gone = set(runs)
    return _with(state, waiting=tuple(run for run in state.waiting if run not in gone))


def _add(state: QueueState, order: Order) -> QueueState:
    if order.run in state.waiting or (state.active is not None and state.active.run == order.run):
        return state
    waiting = list(state.waiting)
    waiting.insert(len(waiting) if order.to is None else _place(order.to, len(waiting) + 1), order.run)
    after = {**state.after, order.run: order.others} if order.others else state.after
    return _with(state, waiting=tuple(waiting), after=after)


def _move(state: QueueState, order: Order) -> QueueState:
    _must_wait(state, order.run)
    waiting = [run for run in state.waiting if run != order.run]
    waiting.insert(_place(order.to or 0, len(state.waiting)), order.run)
    return _with(state, waiting=tuple(waiting))


def _hold(state: QueueState, order: Order) -> QueueState:
    _must_wait(state, order.run)
    return state if order.run in state.held else _with(state, held=(*state.held, order.run))


def _release(state: QueueState, order: Order) -> QueueState:
    _must_wait(state, order.run)
    return _with(state, held=tuple(run for run in state.held if run != order.run))


def _after(state: QueueState, order: Order) -> QueueState:
    _must_wait(state, order.run)
    for other in order.others:
        if (path := _path(state, other, order.run)) is not None:
            raise MosaicError(
                "usage.circle",
                f"{order.run} cannot wait for {other}: {' waits for '.join(path)}.",
                "Take the other dependency away first.",
                field="after",
                run=order.run,
            )
    return _with(state, after={**state.after, order.run: order.others})


def _on_error(state: QueueState, order: Order) -> QueueState:
    if order.mode not in ("continue", "stop"):
        raise MosaicError("usage.on_error", f"After an error: continue or stop, not {order.mode!r}.", field="on_error")
    return _with(state, on_error=order.mode)


def _remove(state: QueueState, order: Order) -> QueueState:
    if state.active is not None and state.active.run == order.run:
        raise MosaicError("run.active", f"{order.run} is running.", "Cancel it first.", run=order.run)
    place = state.waiting.index(order.run) if order.run in state.waiting else None
    entry = Trashed(
        run=order.run,
        time=order.time,
        place=place,
        held=order.run in state.held,
        after=state.after.get(order.run, ()),
    )
    trash = (*(item for item in state.trash if item.run != order.run), entry)
    return _with(state, waiting=tuple(run for run in state.waiting if run != order.run), trash=trash)


def _undo(state: QueueState, order: Order) -> QueueState:
    entry = next((item for item in state.trash if item.run == order.run), None)
    trash = tuple(item for item in state.trash if item.run != order.run)
    if entry is None or entry.place is None or order.run in state.waiting:
        return _with(state, trash=trash)
    waiting = list(state.waiting)
    waiting.insert(min(entry.place, len(waiting)), order.run)
    held = (*state.held, order.run) if entry.held else state.held
    after = {**state.after, order.run: entry.after}
    return _with(state, waiting=tuple(waiting), held=held, after=after, trash=trash)


_CHANGES: dict[str, Any] = {
    "add": _add,
    "move": _move,
    "hold": _hold,
    "release": _release,
    "after": _after,
    "pause": lambda state, order: _with(state, paused=True, remark=order.mode or "paused on request"),
    "resume": lambda state, order: _with(state, paused=False, remark=""),
    "on_error": _on_error,
    "remove": _remove,
    "undo": _undo,
    "empty": lambda state, order: _with(state, trash=()),
}


def _place(to: int, size: int) -> int:
    return max(0, min(to if to >= 0 else size + to, size - 1))


def _must_wait(state: QueueState, run: str) -> None:
    if run not in state.waiting:
        active = state.active is not None and state.active.run == run
        raise MosaicError(
            "run.not_waiting",
            f"{run} is running." if active else f"{run} does not wait in the queue.",
            "" if active else nearest(run, state.waiting),
            run=run,
        )


def _path(state: QueueState, start: str, goal: str) -> list[str] | None:
    """The chain of dependencies from ``start`` to ``goal``, if there is one."""
    paths, seen = [[start]], {start}
    while paths:
        path = paths.pop()
        if path[-1] == goal:
            return path
        for other in state.after.get(path[-1], ()):
            if other not in seen:
                seen.add(other)
                paths.append([*path, other])
    return None


class Obstacle(Frozen):
    """Why a waiting run is not started: in words, and whether that ends by itself (``lasting`` = it does not)."""

    words: str
    lasting: bool


def obstacles(
    state: QueueState, status_of: Callable[[str], str | None]
) -> Iterator[tuple[str, Obstacle | None]]:
    """The waiting runs in order, each with what keeps it from being started; nothing is asked before it is needed.

    ``status_of`` gives the status of a run, ``None`` when there is no such run (any more).
    """
    waiting, held = set(state.waiting), set(state.held)
    active = state.active.run if state.active else None
    known: dict[str, Obstacle | None] = {}

    def of_other(other: str) -> Obstacle | None:
        if other in waiting:  # if it is over already it is found out when its turn comes
            its = of(other)
            if its is not None and its.lasting:
                return Obstacle(words=f"after {other}, which is not started ({its.words})", lasting=True)
            return Obstacle(words=f"after {other}", lasting=False)
        status = status_of(other)
        if status == "done":
            return None
        if other == active or status == "running":
            return Obstacle(words=f"after {other}", lasting=False)
        return Obstacle(words=f"after {other}, which is {status or 'gone'}", lasting=True)

    def of(run: str) -> Obstacle | None:
        if run not in known:
            known[run] = Obstacle(words="in a circle", lasting=True)  # a file edited by hand
            found = None
            if run in held:
                found = Obstacle(words="held", lasting=True)
            else:
                those = [item for other in state.after.get(run, ()) if (item := of_other(other)) is not None]
                found = max(those, key=lambda item: item.lasting, default=None)
            if found is None and state.paused:
                found = Obstacle(words="the queue is paused", lasting=True)
            known[run] = found
        return known[run]

    for run in state.waiting:
        yield run, of(run)
