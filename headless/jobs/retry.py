"""Runs made from other runs: a duplicate with changes, a retry, and the answers to two failures.

A request is frozen, so whatever is changed is a new run, which says what it was made from and why. The answers:

* out of memory: half the minibatch, from the start (the place in a sampler's plan means nothing for another size).
  The effective minibatch is halved with it; nothing is accumulated.
* diverged: a third of the rate, from the last checkpoint whose weights are all numbers, or from the start.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headless.errors import MosaicError, from_os_error
from headless.files import now
from headless.jobs.runfolder import Failure, RunFolder, RunRequest, versions
from headless.project import Experiment, slug
from headless.schema import from_validation

#: So often a failed run is tried again by itself.
MOST_RETRIES = 4
#: What the rate is divided by after training diverged.
RATE_DIVISOR = 3.0
SMALLEST_BATCH = 2


def duplicate(run: RunFolder, changes: Mapping[str, Any], reason: str = "", **request: Any) -> RunFolder:
    """A new run with the request of another one and changed fields: ``seed``, ``device`` or settings of the method.

    Raises
    ------
    MosaicError
        ``model.unknown_setting`` (with the nearest name), ``model.bad_setting``, ``usage.*``; ``disk.*``.
    """
    return RunFolder.make(run.path.parent, variant(run.request, changes, reason or f"copy of {run.id}", **request))


def variant(before: RunRequest, changes: Mapping[str, Any], reason: str, **request: Any) -> RunRequest:
    """The request of :func:`duplicate`. ``request`` are further fields of it, as they are."""
    from headless import models

    settings = {name: value for name, value in changes.items() if name not in ("seed", "device")}
    config = models.get(before.model).config.make(None, **{**before.settings, **settings})
    plain = {"seed": before.seed, "device": before.device}
    try:
        checked = Experiment(name=before.experiment, **{**plain, **{k: changes[k] for k in plain if k in changes}})
    except ValidationError as error:
        raise from_validation(error, "usage.experiment") from None
    made = config.model_dump(mode="json")
    varied = {**before.varied, **{name: made.get(name, changes[name]) for name in changes if name != "device"}}
    update = {
        "settings": made,
        "seed": checked.seed,
        "device": checked.device,
        "varied": varied,
        "origin": before.id,
        "reason": reason,
        "versions": versions(),
        "created": now(),
        "retries": 0,
        **request,
    }
    return before.model_copy(update=update)


def wants_retry(run: RunFolder) -> bool:
    """Did the run fail in a way after which it was to be tried again, and may it be?"""
    family = family_of(run)
    return family is not None and family in run.request.on_failure and run.request.retries < MOST_RETRIES


def family_of(run: RunFolder) -> Failure | None:
    """The failure of a run, if there is an answer to it: reading data needs no less memory by smaller minibatches."""
    state = run.state
    error = state.error or {} if state.status == "failed" else {}
    code = str(error.get("code", ""))
    if code.startswith("memory.") and (error.get("where") or {}).get("phase") == "train":
        return "memory"
    return "diverged" if code.startswith("diverged.") else None


def advised(run: RunFolder) -> RunFolder:
    """The answer to a run's failure, as a new run; the one that is there already if it was made before.

    Raises
    ------
    MosaicError
        ``run.no_advice`` when there is none: another failure, or the minibatch is as small as it can be; ``disk.*``.
    """
    if (there := successor(run)) is not None:
        return _with_checkpoint(there, last_good(run) if there.request.start else None)
    family, request = family_of(run), run.request
    count = {"retries": request.retries + 1}
    if family == "memory":
        size = int(request.settings["batch_size"])
        if size // 2 >= SMALLEST_BATCH:
            reason = (
                f"retry of {run.id}, which ran out of memory: minibatches of {size // 2} instead of {size} cells "
                "(the effective minibatch is smaller too), from the start"
            )
            return duplicate(run, {"batch_size": size // 2}, reason, start="", **count)
    if family == "diverged":
        rate = float(request.settings["lr"]) / RATE_DIVISOR
        checkpoint = last_good(run)
        whence = f"from its checkpoint {checkpoint.name}" if checkpoint else "from the start, as it has no checkpoint"
        reason = f"retry of {run.id}, which diverged: rate {rate:.3g}, {whence}"
        start = f"{run.id}/{checkpoint.name}" if checkpoint else ""
        return _with_checkpoint(duplicate(run, {"lr": rate}, reason, start=start, **count), checkpoint)
    raise MosaicError(
        "run.no_advice",
        f"There is no ready answer to how {run.id} ended.",
        "Retry it with a changed field: mosaic-headless queue retry STUDY RUN --set NAME=VALUE",
        run=run.id,
    )


def successor(run: RunFolder) -> RunFolder | None:
    """The run that was made as the answer to this one's failure."""
    folder, stem = run.path.parent, slug(run.request.experiment)
    for path in sorted(folder.glob(f"{stem}-*")):
        try:
            request = RunFolder(path).request
        except MosaicError:
            continue
        if request.origin == run.id and request.retries == run.request.retries + 1:
            return RunFolder(path)
    return None


def last_retry(run: RunFolder) -> RunFolder:
    """The run itself, or the last of the runs that were made as answers to its failure."""
    while run.path.is_dir() and family_of(run) is not None and (after := successor(run)) is not None:
        run = after
    return run


def last_good(run: RunFolder) -> Path | None:
    """The newest checkpoint in which every weight is a number."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not run.checkpoints.is_dir():
        return None
    whole = [item for item in run.checkpoints.iterdir() if item.name.startswith("step-") and item.suffix != ".part"]
    for path in sorted(whole, reverse=True):
        try:
            weights = load_file(path / "weights.safetensors")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            continue
        if all(bool(np.isfinite(values).all()) for values in weights.values() if values.dtype.kind == "f"):
            return path
    return None


def _with_checkpoint(run: RunFolder, checkpoint: Path | None) -> RunFolder:
    """A run that was not begun yet, with a copy of the checkpoint that its training goes on from."""
    if checkpoint is None or run.checkpoints.is_dir() or run.state.attempts:
        return run
    part = run.path / ".checkpoints.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(checkpoint, part / checkpoint.name)
        part.rename(run.checkpoints)
    except OSError as error:
        raise from_os_error(error, run.checkpoints, "copy the checkpoint to go on from") from error
    return run
