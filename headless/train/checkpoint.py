"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all. No pickle is written or read.

A checkpoint holds all that an exact resume needs: weights, averaged weights, optimiser moments, states of the random
number generators, and the position of the sampler (epoch and step, from which its plan is made anew).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from headless.errors import MosaicError, from_os_error

#: How many of the newest checkpoints are kept; the older one serves when the newest is damaged.
KEEP = 2


@dataclass
class Position:
    """Where training stands, JSON-ready."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_epoch: int | None = None
    sums: dict[str, float] = field(default_factory=dict)
    finished: str | None = None
    module: dict[str, Any] = field(default_factory=dict)


def _optimizer_tensors(optimizers: dict[str, Optimizer]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, optimizer in optimizers.items():
        for number, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                out[f"{name}/{number}/{key}"] = torch.as_tensor(value)
    return out


def _load_optimizers(optimizers: dict[str, Optimizer], tensors: dict[str, Tensor]) -> None:
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, number, entry = key.split("/")
            if owner == name:
                state.setdefault(int(number), {})[entry] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda{number}"] = state
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda{number}" in states:
                torch.cuda.set_rng_state(states[f"cuda{number}"].cpu(), number)


class Checkpoints:
    """The checkpoints of a run.

    Parameters
    ----------
    folder
        ``checkpoints/`` of the run folder; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def names(self) -> list[str]:
        """Whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.name.startswith("step-") and p.suffix != ".part")

    def save(
        self,
        module: nn.Module,
        optimizers: dict[str, Optimizer],
        position: Position,
        average: dict[str, Tensor] | None = None,
        name: str | None = None,
    ) -> Path:
        """Write a checkpoint; all of it, or none.

        Raises
        ------
        MosaicError
            ``disk.full``, ``disk.read_only``.
        """
        target = self.folder / (name or f"step-{position.step:09d}")
        part = target.with_name(target.name + ".part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            weights = {key: value.contiguous() for key, value in module.state_dict().items()}
            save_file(weights, part / "weights.safetensors")
            save_file(_optimizer_tensors(optimizers), part / "optimizers.safetensors")
            save_file(_random_states(), part / "random.safetensors")
            if average is not None:
                save_file(average, part / "average.safetensors")
            (part / "position.json").write_text(json.dumps(vars(position)), encoding="utf-8")
            for file in part.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise from_os_error(error, self.folder, "write a checkpoint") from error
        except SafetensorError as error:
            shutil.rmtree(part, ignore_errors=True)
            if "os error 28" in str(error).lower() or "no space" in str(error).lower():
                raise from_os_error(OSError(28, str(error)), self.folder, "write a checkpoint") from error
            raise MosaicError("disk.failed", f"Could not write a checkpoint: {error}.", file=self.folder) from error
        if name is None:
            for old in self.names()[:-KEEP]:
                shutil.rmtree(self.folder / old, ignore_errors=True)
        return target

    def load(
        self, module: nn.Module, optimizers: dict[str, Optimizer], device: torch.device
    ) -> tuple[Position, dict[str, Tensor] | None] | None:
        """Take back the newest checkpoint that is whole; ``None`` if there is none.

        Raises
        ------
        MosaicError
            ``run.damaged`` when checkpoints exist and none can be read.
        """
        faults = []
        for name in reversed(self.names()):
            folder = self.folder / name
            try:
                weights = load_file(folder / "weights.safetensors", device=str(device))
                moments = load_file(folder / "optimizers.safetensors", device=str(device))
                states = load_file(folder / "random.safetensors")
                average = None
                if (folder / "average.safetensors").exists():
                    average = load_file(folder / "average.safetensors", device=str(device))
                position = Position(**json.loads((folder / "position.json").read_text(encoding="utf-8")))
                module.load_state_dict(weights)
            except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
                faults.append(f"{name}: {error}")
                continue
            _load_optimizers(optimizers, moments)
            _set_random_states(states)
            return position, average
        if faults:
            raise MosaicError(
                "run.damaged",
                f"No checkpoint can be read ({'; '.join(faults)[:300]}).",
                "Retry the run from the start, or restore the folder from a backup.",
                file=self.folder,
            )
        return None

    def weights(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The weights of one checkpoint by name (``best``)."""
        return load_file(self.folder / name / "weights.safetensors", device=str(device))
