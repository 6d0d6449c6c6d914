"""The worker: one process that carries out one run folder, from wherever it stands.

Crash, pre-emption, power loss, retry and resume are all the same path: :func:`execute` is called again, and what a
former worker finished (a checkpoint, the trained model) is loaded instead of computed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headless.errors import EXIT_CODES, MosaicError, from_os_error
from headless.files import as_json, now, write_atomic
from headless.jobs.events import EventWriter
from headless.jobs.runfolder import RunFolder, State, Status, Wish
from headless.lock import Lock, ProcessId

if TYPE_CHECKING:
    from headless.data.mosaic import Mosaic

#: Seconds between two looks at ``control.json``; the loop asks at every step.
LOOK_EVERY = 0.2


class _Leave(BaseException):
    """The worker is to end now, between two phases or inside one that needs no checkpoint."""

    def __init__(self, status: Status, remark: str) -> None:
        super().__init__(remark)
        self.status = status
        self.remark = remark


def execute(run_folder: str | Path) -> int:
    """Carry out (or go on with) a run; the exit code of the worker.

    0 when the run is done; 12 when it was paused, cancelled or interrupted; otherwise that of the error's family,
    which is also written to ``state.json`` and as an ``error`` event.

    Raises
    ------
    MosaicError
        ``run.unknown`` or ``run.damaged`` when there is no run to carry out, ``run.already_running`` when another
        worker is at it, ``disk.*`` when not even the state can be written.
    """
    run = RunFolder(run_folder)
    _ = run.request  # refuse what is no run before anything is written
    with worker_lock(run):
        if run.state.status == "done":
            return EXIT_CODES["ok"]
        writer = run.writer()
        try:
            return Worker(run, writer).work()
        finally:
            writer.close()


def worker_lock(run: RunFolder) -> Lock:
    """Held by whoever writes into the run folder as its worker."""
    return Lock(run.path / "worker.lock", "run.already_running", f"The run {run.id}")


class Worker:
    """The phases of one run, its wishes and its reports."""

    def __init__(self, run: RunFolder, writer: EventWriter) -> None:
        self.run = run
        self.writer = writer
        before = run.state
        self.state = State(
            status="running",
            updated=now(),
            process=ProcessId.of(),
            attempts=before.attempts + 1,
            wish_seen=before.wish_seen,
        )
        self.phase = ""
        self._signalled = ""
        self._ending = False
        self._looked = 0.0

    def work(self) -> int:
        """All phases; the exit code."""
        with _signals(self._on_signal):
            try:
                self._set()
                self.writer.emit("state", status="running", attempt=self.state.attempts, process=self.state.process)
                self.writer.log(f"run {self.run.id}, attempt {self.state.attempts}")
                remark = self._phases()
            except _Leave as leave:
                return self._end(leave.status, leave.remark, EXIT_CODES["stopped"])
            except BaseException as error:
                return self._fail(error)
            return self._end("done", remark, EXIT_CODES["ok"])

    # -- phases --------------------------------------------------------------------------------------------------

    def _phases(self) -> str:
        from headless.data.build import build_mosaic
        from headless.data.holdout import choose

        request = self.run.request
        self.emit("versions", **request.versions)
        with self._phase("load"):
            truth = build_mosaic(request.datasets, request.preparation, self.run.base, note=self.log)
            hidden = choose(truth, request.holdout)
            mosaic = truth.without(hidden)
            self.emit("mosaic", pattern=mosaic.pattern(), hidden={name: len(cells) for name, cells in hidden.items()})
        module, device, remark = self._trained(mosaic)
        with self._phase("decode"):
            from headless import tasks

            tasks.answer(module, mosaic, request.outputs, self.run.results, self.emit, device)
        with self._phase("score"):
            from headless.evaluate import score_run

            metrics = score_run(self.run.results, truth, hidden)
            self.emit("metric", metrics=metrics)
        return remark

    def _trained(self, mosaic: Mosaic) -> tuple[Any, str, str]:
        """The trained module, the device it is on, and a remark; trains unless a former worker finished that."""
        from headless.models.store import load_model, save_model
        from headless.train import devices

        request, finished = self.run.request, self._finished_fit()
        self.log(f"{_use_threads()} CPU threads")
        device = devices.resolve(request.device)
        self.emit("device", device=device, wish=request.device)
        folder = self.run.results / "model"
        if finished is not None:
            with self._phase("build"):
                self.log("training was finished by a former worker; its model is used")
                return load_model(folder, device), device, _remark(finished)
        with self._phase("build"):
            module = self._new_module(mosaic)
        with self._phase("train"):
            from headless.train.loop import fit

            resume = self.run.checkpoints.is_dir() and any(self.run.checkpoints.iterdir())
            result = fit(
                module,
                mosaic,
                module.config,
                seed=request.seed,
                device=device,
                checkpoints=self.run.checkpoints,
                emit=self.emit,
                control=self._control,
                resume=resume,
            )
            if result.outcome == "paused":
                self._leave_paused()
            if result.outcome == "cancelled":
                raise _Leave("cancelled", "cancelled during training")
            found = {name: getattr(result, name) for name in ("outcome", "epochs", "steps", "best_epoch", "seconds")}
            save_model(folder, module, request.model, {"seed": request.seed, "run": self.run.id, "fit": found})
            self.run.checkpoints.mkdir(exist_ok=True)
            # Written last: it is what says that the model beside it is whole.
            write_atomic(self._fit_file, as_json(found, indent=2) + "\n", "save the outcome of training")
            self.emit("artifact", path="results/model")
        return module, device, _remark(found)

    def _new_module(self, mosaic: Mosaic) -> Any:
        from headless import models
        from headless.data.mosaic import Layout
        from headless.train.loop import seed_all

        request = self.run.request
        method = models.get(request.model)
        config = method.config.make(**request.settings)
        verdict = config.supports(mosaic.pattern())
        if verdict.level == "cannot":
            raise MosaicError(
                "model.unsupported",
                f"{method.title} cannot train on this mosaic: {'; '.join(verdict.reasons)}.",
                "Choose another method, or add data.",
                field="model",
            )
        for reason in verdict.reasons:
            self.log(f"note: {reason}")
        seed_all(request.seed)
        return models.create(request.model, config, Layout.of(mosaic, getattr(config, "covariates", ())))

    @property
    def _fit_file(self) -> Path:
        return self.run.checkpoints / "fit.json"

    def _finished_fit(self) -> dict[str, Any] | None:
        try:
            values = json.loads(self._fit_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return values if isinstance(values, dict) else None

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._obey()
        self.phase = name
        self._set(phase=name)
        self.emit("phase", name=name, event="begin")
        self.writer.log(f"phase {name}")
        start = time.monotonic()
        yield
        self.emit("phase", name=name, event="end", seconds=round(time.monotonic() - start, 3))
        self._resource()

    # -- wishes --------------------------------------------------------------------------------------------------

    def _control(self) -> str | None:
        """What the loop is asked to do; called at every step, so the disk is asked a few times a second only."""
        if self._signalled:
            return "pause"
        wish = self._pending()
        if wish is not None:
            self._accept(*wish)
            return wish[1]
        return None

    def _obey(self) -> None:
        """Outside training: leave if asked to. Nothing is lost, since a finished phase is not done again."""
        if self._signalled:
            self._leave_paused()
        wish = self._pending()
        if wish is None or wish[1] not in ("pause", "cancel"):
            return  # stopping early and checkpoints are wishes for the loop: they wait for it
        self._accept(*wish)
        if wish[1] == "pause":
            self._leave_paused()
        raise _Leave("cancelled", f"cancelled during {self.phase or 'the start'}")

    def _pending(self) -> tuple[str, Wish] | None:
        if time.monotonic() - self._looked < LOOK_EVERY:
            return None
        self._looked = time.monotonic()
        wish = self.run.wish()
        return wish if wish is not None and wish[0] != self.state.wish_seen else None

    def _accept(self, number: str, wish: Wish) -> None:
        self._set(wish_seen=number)
        self.writer.log(f"asked to {wish}")

    def _leave_paused(self) -> None:
        if self._signalled:
            raise _Leave("interrupted", f"asked to end by {self._signalled}")
        raise _Leave("paused", "paused on request")

    def _on_signal(self, name: str) -> None:
        self._signalled = name
        if self._ending:
            return
        # Training ends at its next step with a checkpoint; nothing else needs one.
        if self.phase != "train":
            raise _Leave("interrupted", f"asked to end by {name}")

    # -- reports -------------------------------------------------------------------------------------------------

    def emit(self, kind: str, **fields: Any) -> None:
        """Append an event; outside training also the moment at which wishes are obeyed."""
        self.writer.emit(kind, **fields)
        if kind == "log":
            self.writer.log(str(fields.get("text", "")))
        elif kind == "epoch":
            self.writer.log(_epoch_line(fields))
        if self.phase not in ("", "train"):
            self._obey()

    def log(self, text: str) -> None:
        """A line for people, and the same as an event."""
        self.emit("log", level="info", text=text)

    def _set(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)
        self.run.write_state(self.state)

    def _resource(self) -> None:
        import psutil

        memory = psutil.Process().memory_info()
        self.writer.emit("resource", rss=memory.rss, peak=getattr(memory, "peak_wset", None) or _peak_rss())

    def _end(self, status: Status, remark: str, code: int) -> int:
        self._ending = True
        try:
            self.writer.log(f"{status}{': ' + remark if remark else ''}")
            self.writer.emit("state", status=status, remark=remark)
            self._set(status=status, remark=remark, process=None)
        except MosaicError as error:
            return self._fail(error)
        return code

    def _fail(self, error: BaseException) -> int:
        """Write a failure down. On a full disk that may be impossible: then the error itself goes up."""
        self._ending = True
        known = _as_mosaic_error(error, self.run)
        known.where.setdefault("phase", self.phase or "start")
        known.where.setdefault("log", self.run.log_path.name)
        try:
            self.writer.log(f"error [{known.code}]: {known}")
            if known.code.startswith("internal"):
                self.writer.log("".join(traceback.format_exception(error)).rstrip())
            self.writer.emit("error", **known.as_dict())
            self.writer.emit("state", status="failed", remark=known.message)
            self._set(status="failed", remark=known.message, error=known.as_dict(), process=None)
        except MosaicError:
            raise known from error
        return known.exit_code


def _as_mosaic_error(error: BaseException, run: RunFolder) -> MosaicError:
    if isinstance(error, MosaicError):
        return error
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return MosaicError(
            "memory.device",
            "The device ran out of memory.",
            "Lower the minibatch size or choose another device, then run again: it goes on from the last checkpoint.",
        )
    if isinstance(error, MemoryError):
        return MosaicError(
            "memory.ram",
            "The computer ran out of memory.",
            "Close other programs, lower the minibatch size or select fewer features.",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return from_os_error(error, error.filename or run.path, "carry out the run")
    return MosaicError(
        "internal.bug",
        f"Something went wrong that is not your fault: {kind}: {error}",
        f"The details are in {run.log_path.name} of the run; please report them.",
        run=run.id,
    )


@contextmanager
def _signals(handle: Callable[[str], None]) -> Iterator[None]:
    """SIGTERM (and Ctrl-C of a worker started by hand) end the run with a checkpoint; crashes leave a trace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no real stderr
        faulthandler.enable()
    before = {
        number: signal.signal(number, lambda received, _frame: handle(signal.Signals(received).name))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def thread_count() -> int:
    """CPU threads of a run: what the environment says, else the physical cores that this process may use."""
    import psutil

    wish = os.environ.get("MOSAIC_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    if wish.isdecimal() and int(wish) > 0:
        return int(wish)
    allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed or 1))


def _use_threads() -> int:
    import torch

    threads = thread_count()
    torch.set_num_threads(threads)
    return threads


def _peak_rss() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def _remark(fit: dict[str, Any]) -> str:
    epochs = fit.get("epochs")
    return {
        "stopped early": f"training was stopped early on request after {epochs} epochs",
        "plateau": f"training ended after {epochs} epochs: the validation loss no longer improved",
    }.get(str(fit.get("outcome")), "")


def _epoch_line(fields: dict[str, Any]) -> str:
    terms = fields.get("train") or {}
    losses = ", ".join(f"{name} {value:.4g}" for name, value in terms.items() if isinstance(value, (int, float)))
    seconds = fields.get("seconds")
    took = f" ({seconds:.1f} s)" if isinstance(seconds, (int, float)) else ""
    return f"epoch {fields.get('epoch')}{took}: {losses}"
