"""Draws the picture of the README from the results of a run: ``python resources/help/overview.py RESULTS_FOLDER``.

Left, the mosaic: which batch has which modality. Right, the embedding (UMAP of the biological part of the joint
latent), once by cell type and once by batch. Nothing is drawn that the run did not give.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import umap
from matplotlib.axes import Axes
from matplotlib.patches import ConnectionPatch, FancyBboxPatch

TITLES = {"rna": "RNA", "adt": "Protein", "atac": "Chromatin"}
MODALITY_COLOURS = {"rna": "#3b6fb6", "adt": "#d98b2b", "atac": "#4f9d69"}
# Okabe and Ito's colours, told apart by colour-blind readers too, then a few darker ones.
COLOURS = [
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#6A51A3",
    "#7F7F7F", "#1B4F72", "#8C510A", "#01665E",
]  # fmt: skip
INK, PALE = "#22303c", "#dfe5ea"


def draw_mosaic(axes: Axes, cells: pd.DataFrame, modalities: list[str]) -> None:
    batches = sorted(cells["batch"].unique())
    for row, batch in enumerate(batches):
        of_batch = cells[cells["batch"] == batch]
        for column, modality in enumerate(modalities):
            share = of_batch[f"measured_{modality}"].mean()
            axes.add_patch(
                FancyBboxPatch(
                    (column + 0.07, row + 0.1), 0.86, 0.8, boxstyle="round,pad=0,rounding_size=0.1", linewidth=1.2,
                    facecolor=MODALITY_COLOURS[modality] if share else "none",
                    edgecolor=MODALITY_COLOURS[modality] if share else PALE,
                    linestyle="-" if share else (0, (3, 2)),
                )
            )  # fmt: skip
            if not share:
                axes.text(column + 0.5, row + 0.5, "not\nmeasured", ha="center", va="center", color="#97a3ad", size=8)
        axes.text(-0.08, row + 0.5, f"{batch}\n{len(of_batch):,} cells", ha="right", va="center", color=INK, size=9)
    for column, modality in enumerate(modalities):
        axes.text(column + 0.5, -0.12, TITLES[modality], ha="center", va="bottom", color=INK, size=10, weight="bold")
    axes.set(xlim=(0, len(modalities)), ylim=(len(batches), 0))
    axes.set_axis_off()


def draw_cells(axes: Axes, points: np.ndarray, groups: pd.Series, title: str) -> None:
    order = np.random.default_rng(0).permutation(len(points))
    names = sorted(groups.unique())
    code = pd.Categorical(groups, categories=names).codes
    colours = np.array([mpl.colors.to_rgba(COLOURS[i % len(COLOURS)]) for i in range(len(names))])
    axes.scatter(*points[order].T, c=colours[code[order]], s=5, linewidths=0, alpha=0.85)
    for index, name in enumerate(names):
        axes.scatter([], [], color=colours[index], s=22, label=name)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3 if max(map(len, names)) > 8 else 4, frameon=False,
        fontsize=8.5, labelcolor=INK, handletextpad=0.1, columnspacing=0.9, borderaxespad=0.2,
    )  # fmt: skip
    axes.set_title(title, color=INK, size=11, weight="bold", pad=4)
    axes.set_axis_off()


def main(results: Path, target: Path) -> None:
    cells = ad.read_h5ad(results / "cells.h5ad").obs
    latent = np.load(results / "latents" / "joint.c.npy", allow_pickle=False)
    modalities = [name for name in TITLES if f"measured_{name}" in cells]
    points = umap.UMAP(n_neighbors=20, min_dist=0.35, random_state=0).fit_transform(latent)

    figure = plt.figure(figsize=(12, 4.6), facecolor="white")
    left = figure.add_axes((0.095, 0.10, 0.24, 0.72))
    middle = figure.add_axes((0.40, 0.17, 0.29, 0.73))
    right = figure.add_axes((0.70, 0.17, 0.29, 0.73))
    draw_mosaic(left, cells, modalities)
    draw_cells(middle, points, cells["label"].astype(str), "one atlas, by cell type")
    draw_cells(right, points, cells["batch"].astype(str), "the same, by batch")
    figure.add_artist(
        ConnectionPatch(
            (0.35, 0.46), (0.395, 0.46), "figure fraction", arrowstyle="-|>,head_width=0.5,head_length=0.8",
            color=INK, linewidth=2.2,
        )
    )  # fmt: skip
    figure.text(0.215, 0.915, "what was measured", ha="center", color=INK, size=11, weight="bold")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_suffix(".png"))
