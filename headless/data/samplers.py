"""Which cells meet in a minibatch. Deterministic, and resumable from (seed, epoch, step) alone.

The plan of an epoch depends on the seed and the number of the epoch and on nothing else, so a run that was killed
makes the same plan again and goes on at its step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.int64]


class Sampler(ABC):
    """Plans of epochs: lists of cell numbers, one array a step.

    Parameters
    ----------
    batches
        For each batch the numbers of its cells that may be drawn; empty batches are left out.
    size
        Cells a minibatch.
    seed
        Seed of the order.
    """

    def __init__(self, batches: Sequence[Cells], size: int, seed: int) -> None:
        self.batches = [np.asarray(cells, dtype=np.int64) for cells in batches if len(cells)]
        self.size = size
        self.seed = seed

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps an epoch."""

    @abstractmethod
    def _plan(self, random: np.random.Generator) -> list[Cells]: ...

    def plan(self, epoch: int) -> list[Cells]:
        """The minibatches of an epoch (0, 1, ...)."""
        return self._plan(np.random.default_rng([self.seed, epoch]))


def _draw(cells: Cells, total: int, random: np.random.Generator) -> Cells:
    """``total`` cells: without replacement until the batch is exhausted, then shuffled anew."""
    rounds = [random.permutation(cells) for _ in range(ceil(total / len(cells)))]
    return np.concatenate(rounds)[:total]


class OneBatchSampler(Sampler):
    """Every minibatch holds cells of one batch (MIDAS, section 5 of its sheet).

    A round visits every batch once in random order; an epoch has ``ceil(min(largest batch, cap) / size)`` rounds, so
    all batches weigh the same: large ones are cut at ``cap`` cells an epoch, small ones are seen again.
    """

    def __init__(self, batches: Sequence[Cells], size: int, seed: int, cap: int = 10_000) -> None:
        super().__init__(batches, size, seed)
        self.cap = cap

    @property
    def rounds(self) -> int:
        """Rounds an epoch."""
        return ceil(min(max(len(cells) for cells in self.batches), self.cap) / self.size)

    @property
    def steps(self) -> int:
        return self.rounds * len(self.batches)

    def _plan(self, random: np.random.Generator) -> list[Cells]:
        sizes = [min(self.size, len(cells)) for cells in self.batches]
        drawn = [_draw(cells, self.rounds * n, random) for cells, n in zip(self.batches, sizes, strict=True)]
        plan = []
        for number in range(self.rounds):
            for batch in random.permutation(len(self.batches)):
                n = sizes[batch]
                plan.append(drawn[batch][number * n : (number + 1) * n])
        return plan


class MixedSampler(Sampler):
    """Minibatches drawn from all cells alike; every cell once an epoch."""

    @property
    def steps(self) -> int:
        return ceil(sum(map(len, self.batches)) / self.size)

    def _plan(self, random: np.random.Generator) -> list[Cells]:
        order = random.permutation(np.concatenate(self.batches))
        return [part for part in np.array_split(order, self.steps) if len(part)]


class StratifiedSampler(Sampler):
    """Every minibatch holds the same number of cells of each batch; an epoch tours the largest batch once."""

    @property
    def share(self) -> int:
        """Cells of each batch in a minibatch."""
        return max(1, self.size // len(self.batches))

    @property
    def steps(self) -> int:
        return ceil(max(map(len, self.batches)) / self.share)

    def _plan(self, random: np.random.Generator) -> list[Cells]:
        drawn = [_draw(cells, self.steps * self.share, random) for cells in self.batches]
        cut = slice
        return [
            np.concatenate([cells[cut(step * self.share, (step + 1) * self.share)] for cells in drawn])
            for step in range(self.steps)
        ]


class TwoBatchSampler(Sampler):
    """Minibatches of two chunks, each of cells of one batch (the sampler of the Multigrate package).

    Every batch is shuffled and cut into chunks of half a minibatch (the rest is left out if there is more than one
    chunk); chunks are shuffled and joined two by two, so about one pair in G is of the same batch.
    """

    @property
    def steps(self) -> int:
        return ceil(sum(self._chunks(cells) for cells in self.batches) / 2)

    def _chunks(self, cells: Cells) -> int:
        return max(1, len(cells) // max(1, self.size // 2))

    def _plan(self, random: np.random.Generator) -> list[Cells]:
        half = max(1, self.size // 2)
        chunks = []
        for cells in self.batches:
            order = random.permutation(cells)
            chunks += [order[n * half : (n + 1) * half] for n in range(self._chunks(cells))]
        mixed = [chunks[number] for number in random.permutation(len(chunks))]
        return [np.concatenate(mixed[n : n + 2]) for n in range(0, len(mixed), 2)]


SAMPLERS: dict[str, type[Sampler]] = {
    "one batch": OneBatchSampler,
    "mixed": MixedSampler,
    "stratified": StratifiedSampler,
    "two batches": TwoBatchSampler,
}
