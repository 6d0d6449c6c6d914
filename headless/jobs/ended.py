"""What the queue writes into a run folder once the worker is gone: the last word, where the worker left none."""

from __future__ import annotations

import contextlib

from headless.errors import MosaicError
from headless.files import now
from headless.jobs.runfolder import RunFolder, State, Status


def hand_back(run: RunFolder, attempt: int) -> Status:
    """Take back the state of a run whose worker is gone; one that did not say how it ended was interrupted."""
    try:
        state = run.state
    except MosaicError:
        remark = "state.json was damaged; the run goes on from its last checkpoint"
        run.write_state(State(status="interrupted", updated=now(), attempts=attempt, remark=remark))
        return "interrupted"
    if state.attempts < attempt:  # the worker ended before its first word
        hint = "What it printed is in the log."
        write_failure(run, MosaicError("run.not_started", "The worker ended before it began.", hint, run=run.id))
        return "failed"
    if state.status == "running":
        remark = f"the worker ended without a word during {state.phase or 'its start'}"
        run.write_state(state.model_copy(update={"status": "interrupted", "process": None, "remark": remark}))
        return "interrupted"
    return state.status


def write_failure(run: RunFolder, error: MosaicError) -> None:
    """Write down the failure of a run that no worker can tell of."""
    error.where.setdefault("log", run.log_path.name)
    values = error.as_dict()
    with contextlib.suppress(MosaicError):  # the state below is what counts
        writer = run.writer()
        writer.log(f"error [{error.code}]: {error}")
        writer.emit("error", **values)
        writer.emit("state", status="failed", remark=error.message)
        writer.close()
    changes = {"status": "failed", "process": None, "remark": error.message, "error": values}
    run.write_state(run.state.model_copy(update=changes))
