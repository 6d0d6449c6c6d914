"""The loop that trains every method, on Lightning Fabric.

The module says which losses update what (:meth:`headless.models.base.Module.training_step`); the loop owns the order
of cells, devices, precision, schedules, checkpoints, validation, events, and the wishes that come from outside.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW, Optimizer

from headless.data.minibatch import MinibatchMaker
from headless.data.mosaic import Mosaic
from headless.data.samplers import SAMPLERS, OneBatchSampler, Sampler
from headless.errors import MosaicError
from headless.models.base import Module
from headless.models.config import ModelConfig
from headless.train.checkpoint import Checkpoints, Position
from headless.train.devices import precision_for
from headless.train.schedule import AveragedWeights, rate_factor, total_steps

#: A checkpoint is due after this many seconds even if the epochs for one have not passed.
CHECKPOINT_SECONDS = 60.0
#: Steps are reported at most this often; epochs always.
REPORT_SECONDS = 0.5
#: On a GPU the loss is looked at every so many steps only, as each look waits for the device.
LOOK_EVERY = 25


@dataclass(frozen=True)
class FitResult:
    """How training ended: ``finished``, ``plateau``, ``stopped early``, ``paused`` or ``cancelled``."""

    outcome: str
    epochs: int
    steps: int
    best_epoch: int | None
    seconds: float


def seed_all(seed: int) -> None:
    """Seed the generators that networks draw from; call it before a network is made."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def fit(
    module: Module,
    mosaic: Mosaic,
    config: ModelConfig,
    *,
    seed: int,
    device: str,
    checkpoints: Path,
    emit: Callable[..., None],
    control: Callable[[], str | None] = lambda: None,
    resume: bool = False,
) -> FitResult:
    """Train a module on a mosaic.

    Parameters
    ----------
    module, mosaic, config
        What is trained on what and how. The module is moved to the device and holds the final weights afterwards.
    seed
        Seed of the order of cells and of all noise.
    device
        ``cpu`` or ``cuda:N`` (see :func:`headless.train.devices.resolve`).
    checkpoints
        Folder for checkpoints.
    emit
        ``emit(kind, **fields)`` takes events: step, epoch, control, artifact, log.
    control
        Asked before every step: ``None``, ``pause`` (checkpoint and leave), ``stop`` (stop early and keep),
        ``cancel`` (leave at once) or ``checkpoint``.
    resume
        Go on from the newest checkpoint if there is one; bit-identical on the CPU.

    Raises
    ------
    MosaicError
        ``diverged.loss``, ``memory.device``, ``memory.ram``, ``disk.*``, ``run.damaged``.
    """
    trainer = _Trainer(module, mosaic, config, seed, device, Checkpoints(checkpoints), emit, control)
    try:
        return trainer.run(resume)
    except torch.cuda.OutOfMemoryError as error:
        raise _out_of_memory("memory.device", "The GPU", config, error) from error
    except MemoryError as error:
        raise _out_of_memory("memory.ram", "The computer", config, error) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise _out_of_memory("memory.ram", "The computer", config, error) from error
        raise


def _out_of_memory(code: str, who: str, config: ModelConfig, error: BaseException) -> MosaicError:
    detail = str(error).splitlines()[0] if str(error) else ""
    return MosaicError(
        code,
        f"{who} ran out of memory while training with minibatches of {config.batch_size} cells. {detail}".strip(),
        f"Retry with half the minibatch (--set batch_size={max(2, config.batch_size // 2)}), or fewer features.",
        field="batch_size",
    )


class _Trainer:
    def __init__(
        self,
        module: Module,
        mosaic: Mosaic,
        config: ModelConfig,
        seed: int,
        device: str,
        checkpoints: Checkpoints,
        emit: Callable[..., None],
        control: Callable[[], str | None],
    ) -> None:
        self.config = config
        self.checkpoints = checkpoints
        self.emit = emit
        self.control = control
        self.seed = seed
        self.fabric = _fabric(device, config)
        self.device = torch.device(device)
        self.module = module.to(self.device)
        self.module.autocast = self.fabric.autocast
        self.optimizers, self.rates = _optimizers(module)
        self.train_cells, self.validation_cells = split(mosaic, config.validation_fraction, seed)
        self.sampler = make_sampler(config, mosaic, self.train_cells, seed)
        self.maker = MinibatchMaker(mosaic, self.device, module.layout.covariates)
        self.total = total_steps(config, self.sampler.steps)
        self.position = Position()
        self.average = AveragedWeights(module, config.average_weights) if config.average_weights > 0 else None
        self.sums: dict[str, Tensor] = {}
        self.looked = 0
        self.started = time.monotonic()
        self.saved = self.reported = self.started

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self, resume: bool) -> FitResult:
        torch.manual_seed(self.seed)
        if resume and (found := self.checkpoints.load(self.module, self.optimizers, self.device)) is not None:
            self.position, average = found
            if self.average is not None and average is not None:
                self.average.values = {name: average[name] for name in self.average.values}
            self.sums = {key: torch.tensor(v, device=self.device) for key, v in self.position.sums.items()}
            self.module.load_extra_state(self.position.module)
            self.emit("log", level="info", text=f"Resumed at epoch {self.position.epoch}, step {self.position.step}.")
        else:
            self._prepare()
        outcome = self.position.finished
        while outcome is None:
            outcome = self._epoch()
        self.module.train(False)
        if outcome in ("paused", "cancelled"):
            return self._result(outcome)
        if self.position.finished is None:
            self.position.finished = outcome
            self._save()
        self._final_weights()
        return self._result(outcome)

    @torch.no_grad()
    def _prepare(self) -> None:
        """Let the module learn what is fixed from the training cells, in order."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.module.prepare(self.maker.in_order(1024, np.sort(np.concatenate(self.train_cells))))

    def _epoch(self) -> str | None:
        """Train to the end of the current epoch; why training ends, or ``None`` to go on."""
        at = self.position
        if at.step >= self.total:
            return "finished"
        if at.step_in_epoch == 0:
            self.module.start_epoch(at.epoch, at.step, self.total)
        self.module.train()
        plan = self.sampler.plan(at.epoch)[at.step_in_epoch :][: self.total - at.step]
        stream = self.maker.stream(plan)
        for batch in stream:
            wish = self.control()
            if wish is not None and (outcome := self._obey(wish)) is not None:
                return outcome
            self._set_rates(rate_factor(self.config, at.step, self.total))
            for update in self.module.training_step(batch):
                optimizer = self.optimizers[update.optimizer]
                optimizer.zero_grad(set_to_none=True)
                self.fabric.backward(reduce(add, update.terms.values()))
                if self.config.gradient_clip is not None:
                    for group in optimizer.param_groups:
                        torch.nn.utils.clip_grad_norm_(group["params"], self.config.gradient_clip)
                optimizer.step()
                self._record(update.terms)
            at.step += 1
            at.step_in_epoch += 1
            if self.average is not None:
                self.average.update(self.module, at.step)
            self._look(force=False)
        return self._end_epoch()

    def _end_epoch(self) -> str | None:
        at = self.position
        self._look(force=True)
        steps = max(1, at.step_in_epoch)
        train = {key: float(value) / steps for key, value in self.sums.items()}
        at.epoch, at.step_in_epoch, self.sums = at.epoch + 1, 0, {}
        validation = self._validate()
        self.emit(
            "epoch",
            epoch=at.epoch,
            epochs=-(-self.total // self.sampler.steps),
            step=at.step,
            steps=self.total,
            seconds=round(self._seconds(), 3),
            lr=self.config.lr * rate_factor(self.config, at.step - 1, self.total),
            train=train,
            validation=validation,
        )
        if at.step >= self.total:
            return "finished"
        if validation and self._plateau(validation):
            return "plateau"
        due = at.epoch % self.config.checkpoint_every == 0
        if due or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self._save()
        return None

    # ---- the parts ----------------------------------------------------------------------------------------------

    def _record(self, terms: dict[str, Tensor]) -> None:
        for key, value in terms.items():
            value = value.detach()
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def _look(self, force: bool) -> None:
        """Is the loss still a number, and is a report due?"""
        at = self.position
        self.looked += 1
        if not force and self.device.type == "cuda" and self.looked % LOOK_EVERY:
            return
        if not self.sums:
            return
        total = torch.stack([value.float() for value in self.sums.values()])
        if not bool(torch.isfinite(total).all()):
            bad = [key for key, ok in zip(self.sums, torch.isfinite(total).tolist(), strict=True) if not ok]
            raise MosaicError(
                "diverged.loss",
                f"Training diverged in epoch {at.epoch + 1} (step {at.step}): {', '.join(bad)} is no longer a number.",
                f"Go back to the last checkpoint with a smaller rate (--set lr={self.config.lr / 3:.2g}).",
                field="lr",
                term=", ".join(bad),
            )
        now = time.monotonic()
        if now - self.reported > REPORT_SECONDS and at.step_in_epoch:
            self.reported = now
            loss = {key: float(value) / at.step_in_epoch for key, value in self.sums.items()}
            self.emit("step", step=at.step, steps=self.total, epoch=at.epoch + 1, seconds=round(self._seconds(), 3),
                      train=loss)  # fmt: skip

    def _obey(self, wish: str) -> str | None:
        self.emit("control", wish=wish, step=self.position.step)
        if wish == "cancel":
            return "cancelled"
        if wish in ("pause", "checkpoint"):
            self._save()
        return {"pause": "paused", "stop": "stopped early"}.get(wish)

    def _set_rates(self, factor: float) -> None:
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * factor

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss terms on the validation cells, a cell counting once; noise is the same every time."""
        if not len(self.validation_cells):
            return {}
        self.module.train(False)
        totals: dict[str, float] = defaultdict(float)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            for batch in self.maker.in_order(1024, self.validation_cells):
                for key, value in self.module.loss(batch).items():
                    totals[key] += float(value) * batch.n
        return {key: value / len(self.validation_cells) for key, value in totals.items()}

    def _plateau(self, validation: dict[str, float]) -> bool:
        """Keep the best weights; has the validation loss stopped falling for as long as patience allows?"""
        at = self.position
        score = self.module.monitor(validation)
        if at.best is None or score < at.best:
            at.best, at.best_epoch = score, at.epoch
            if self.config.patience:
                self._save("best")
        waited = at.epoch - (at.best_epoch or 0)
        return bool(self.config.patience) and at.epoch >= self.config.min_epochs and waited >= self.config.patience

    def _final_weights(self) -> None:
        if self.average is not None:
            self.average.copy_to(self.module)
        elif self.config.patience and self.position.best_epoch is not None:
            self.module.load_state_dict(self.checkpoints.weights("best", self.device))

    def _save(self, name: str | None = None) -> None:
        at = self.position
        at.seconds = self._seconds()
        self.started = time.monotonic()
        at.sums = {key: float(value) for key, value in self.sums.items()}
        at.module = self.module.extra_state()
        path = self.checkpoints.save(
            self.module, self.optimizers, at, None if self.average is None else self.average.values, name
        )
        self.saved = time.monotonic()
        self.emit("artifact", path=f"checkpoints/{path.name}", epoch=at.epoch, step=at.step)

    def _seconds(self) -> float:
        return self.position.seconds + time.monotonic() - self.started

    def _result(self, outcome: str) -> FitResult:
        at = self.position
        return FitResult(outcome, at.epoch, at.step, at.best_epoch, round(self._seconds(), 3))


def _fabric(device: str, config: ModelConfig) -> Fabric:
    kind, _, number = device.partition(":")
    # Fabric tells at length which hardware it sees; doctor and the events say what matters.
    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Fabric(
            accelerator="cuda" if kind == "cuda" else "cpu",
            devices=[int(number or 0)] if kind == "cuda" else 1,
            precision=precision_for(config.precision, device),  # type: ignore[arg-type]
        )


def _optimizers(module: Module) -> tuple[dict[str, Optimizer], dict[str, float]]:
    specs = module.optimizers()
    made: dict[str, Optimizer] = {
        name: AdamW(
            list(s.parameters), lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, amsgrad=s.amsgrad,
            fused=True,
        )
        for name, s in specs.items()
    }
    return made, {name: s.lr for name, s in specs.items()}


def split(mosaic: Mosaic, fraction: float, seed: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Training cells of each batch, and the cells kept for validation (``fraction`` of each batch)."""
    random = np.random.default_rng([seed, 2**31])
    codes = mosaic.batch_codes
    train: list[NDArray[np.int64]] = []
    kept: list[NDArray[np.int64]] = []
    for code in range(len(mosaic.batches)):
        cells = random.permutation(np.flatnonzero(codes == code))
        n = int(len(cells) * fraction)
        kept.append(np.sort(cells[:n]))
        train.append(np.sort(cells[n:]))
    return train, np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)


def make_sampler(config: ModelConfig, mosaic: Mosaic, cells: Sequence[NDArray[np.int64]], seed: int) -> Sampler:
    """The sampler that a configuration names (``sampler``, ``cells_per_epoch``); mixed if it names none."""
    measured = np.zeros(mosaic.n_cells, dtype=bool)
    for tile in mosaic.tiles.values():
        measured[tile.cells] = True
    # A cell with nothing measured teaches nothing.
    usable = [numbers[measured[numbers]] for numbers in cells]
    if not any(len(numbers) for numbers in usable):
        raise MosaicError("data.no_cells", "No cell is left to train on.", "Loosen the quality thresholds.")
    kind = SAMPLERS[getattr(config, "sampler", "mixed")]
    if kind is OneBatchSampler:
        return OneBatchSampler(usable, config.batch_size, seed, getattr(config, "cells_per_epoch", 10_000))
    return kind(usable, config.batch_size, seed)
