"""Programs of a trained scMM on published blood cells: a protein and the genes of its cell type move together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from headless.data.build import build_mosaic
from headless.data.mosaic import Layout
from headless.data.preparation import Preparation
from headless.data.propose import propose
from headless.data.read import peek
from headless.models import create, get
from headless.tasks.programs import programs
from headless.train.loop import fit, seed_all

#: Protein -> genes that are known to go with it: its own, and markers of the cells that carry it.
KNOWN = {"CD19": ("MS4A1", "CD19", "CD79A"), "CD3": ("CD3D", "CD3E", "CD3G"), "CD14": ("CD14",)}


def test_proteins_and_their_genes_share_dimension_and_sign(shared_data: Path, tmp_path: Path) -> None:
    """In the dimension that moves a protein most, its genes move the same way, among the strongest tenth."""
    reference = propose(peek(shared_data / "pbmc10k_cite.h5mu"), shared_data)
    mosaic = build_mosaic([reference], Preparation(n_top_genes=1500), shared_data)
    config = get("scmm").config.make(
        "fast", max_epochs=12, kl_warmup=4, lr=3e-3, patience=0, dim=10, hidden_rna=100, hidden_other=64,
        average_weights=0.0, warmup_steps=0, alignment=0.0, input_dropout=0.0, validation_fraction=0.2,
    )  # fmt: skip
    seed_all(0)
    module = create("scmm", config, Layout.of(mosaic))
    fit(module, mosaic, config, seed=0, device="cpu", checkpoints=tmp_path, emit=lambda kind, **fields: None)
    found = programs(module)
    genes = found.tables["rna"].pivot(index="feature", columns="dimension", values="log2_ratio")
    proteins = found.tables["adt"].pivot(index="feature", columns="dimension", values="log2_ratio")
    seen = 0
    for protein, markers in KNOWN.items():
        dimension = proteins.loc[protein].abs().idxmax()
        along = np.sign(proteins.loc[protein, dimension]) * genes[dimension]
        place = along.rank(ascending=False)
        for gene in markers:
            if gene in genes.index:
                seen += 1
                assert along[gene] > 0, (protein, gene)
                assert place[gene] <= len(genes) / 10, (protein, gene, place[gene])
    assert seen >= 6
