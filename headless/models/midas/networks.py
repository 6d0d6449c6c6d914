"""The networks of MIDAS, layer by layer as in section 3 of its sheet.

Weights of first layers are stored ``(in, out)`` and sub-networks of chromosomes and discriminators are grouped; the
numbers of parameters and the functions are those of the original.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headless.data.minibatch import TileRows
from headless.models.blocks import Block, ChunkedSparseLinear, GroupedLinear, SparseLinear
from headless.models.midas.config import MidasConfig


def stack(widths: list[int], p: float) -> nn.Sequential:
    """Linear layers with a Block after each but the last: ``[a, b, c]`` is Linear(a, b) Block(b) Linear(b, c)."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out), Block(n_out, p)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class ChunkEncoder(nn.Module):
    """A small network a chromosome, concatenated: peaks to ``K * chunk_out`` numbers, then a Block."""

    def __init__(self, sizes: tuple[int, ...], config: MidasConfig) -> None:
        super().__init__()
        groups, p = len(sizes), config.dropout
        widths = [*config.chunk_hidden, config.chunk_out]
        self.first = ChunkedSparseLinear(sizes, widths[0])
        self.blocks = nn.ModuleList(Block(width, p, groups) for width in widths[:-1])
        self.linears = nn.ModuleList(GroupedLinear(groups, n_in, n_out) for n_in, n_out in pairwise(widths))
        self.last = Block(groups * config.chunk_out, p)

    def forward(self, x: TileRows) -> Tensor:
        h = self.first(x).transpose(0, 1)
        for block, linear in zip(self.blocks, self.linears, strict=True):
            h = linear(block(h))
        return self.last(h.transpose(0, 1).reshape(x.n_rows, -1))  # type: ignore[no-any-return]


class ChunkDecoder(nn.Module):
    """The mirror of :class:`ChunkEncoder`: ``K * chunk_out`` numbers to a logit a peak."""

    def __init__(self, sizes: tuple[int, ...], config: MidasConfig) -> None:
        super().__init__()
        groups, p = len(sizes), config.dropout
        self.groups = groups
        self.chunk_out = config.chunk_out
        widths = [config.chunk_out, *reversed(config.chunk_hidden)]
        self.first = Block(groups * config.chunk_out, p)
        self.linears = nn.ModuleList(GroupedLinear(groups, n_in, n_out) for n_in, n_out in pairwise(widths))
        self.blocks = nn.ModuleList(Block(width, p, groups) for width in widths[1:])
        self.heads = nn.ModuleList(nn.Linear(widths[-1], size) for size in sizes)

    def forward(self, h: Tensor) -> Tensor:
        h = self.first(h).view(len(h), self.groups, self.chunk_out).transpose(0, 1)
        for linear, block in zip(self.linears, self.blocks, strict=True):
            h = block(linear(h))
        return torch.cat([head(part) for head, part in zip(self.heads, h, strict=True)], dim=1)


class DataEncoder(nn.Module):
    """One modality to ``data_hidden`` numbers; chunked if its features come in several chunks."""

    def __init__(self, sizes: tuple[int, ...], config: MidasConfig) -> None:
        super().__init__()
        width = config.data_hidden
        self.chunks = ChunkEncoder(sizes, config) if len(sizes) > 1 else None
        self.linear: nn.Module
        if self.chunks is None:
            self.linear = SparseLinear(sum(sizes), width)
        else:
            self.linear = nn.Linear(len(sizes) * config.chunk_out, width)
        self.block = Block(width, config.dropout)

    def forward(self, x: TileRows) -> Tensor:
        return self.block(self.linear(x if self.chunks is None else self.chunks(x)))  # type: ignore[no-any-return]


class DataDecoder(nn.Module):
    """z to the parameters of each modality's likelihood; only modalities that are asked for are computed."""

    def __init__(self, chunks: dict[str, tuple[int, ...]], dim_z: int, config: MidasConfig) -> None:
        super().__init__()
        p = config.dropout
        widths = [dim_z, *reversed(config.trunk_hidden), config.data_hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), Block(n_out, p)]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict()
        self.tails = nn.ModuleDict()
        for modality, sizes in chunks.items():
            chunked = len(sizes) > 1
            self.heads[modality] = nn.Linear(
                config.data_hidden, len(sizes) * config.chunk_out if chunked else sum(sizes)
            )
            if chunked:
                self.tails[modality] = ChunkDecoder(sizes, config)

    def head(self, hidden: Tensor, modality: str) -> Tensor:
        """The parameters of one modality from the trunk's output."""
        out: Tensor = self.heads[modality](hidden)
        if modality in self.tails:
            out = self.tails[modality](out)
        return out


class Discriminators(nn.Module):
    """One discriminator a modality and one for the joint state, computed together.

    Head ``h`` tells from c which of its ``n_classes[h]`` batches a cell is from.
    """

    def __init__(self, dim_c: int, n_classes: list[int], p: float) -> None:
        super().__init__()
        heads = len(n_classes)
        self.first = GroupedLinear(heads, dim_c, 128)
        self.first_block = Block(128, p, heads)
        self.second = GroupedLinear(heads, 128, 64)
        self.second_block = Block(64, p, heads)
        self.last = nn.ModuleList(nn.Linear(64, n) for n in n_classes)

    def forward(self, c: Tensor, heads: list[int], labels: list[Tensor], weights: list[Tensor | None]) -> Tensor:
        """Sum over heads of the cross entropy, each divided by the number of cells of the minibatch.

        Parameters
        ----------
        c
            ``(H, n, dim_c)``, one slice for each entry of ``heads``.
        labels, weights
            For each head ``(n,)`` class of each cell, and 1 where the cell counts, 0 where not (``None`` = all count).
        """
        h = self.first_block(self.first(c, heads), heads)
        h = self.second_block(self.second(h, heads), heads)
        total = c.new_zeros((), dtype=torch.float32)
        for number, head in enumerate(heads):
            logits = self.last[head](h[number]).float()
            weight = weights[number]
            if weight is None:
                total = total + cross_entropy(logits, labels[number])
            else:
                total = total + (cross_entropy(logits, labels[number], reduction="none") * weight).mean()
        return total
