"""Settings of scMM (Minoura et al., Cell Reports Methods 1:100071, 2021)."""

from __future__ import annotations

from itertools import combinations
from typing import Any, Literal

from headless.data.pattern import Pattern, Verdict
from headless.models.config import ModelConfig
from headless.schema import Field

#: Modalities that scMM has a likelihood for.
KNOWN = ("rna", "adt", "atac")


class ScmmConfig(ModelConfig):
    """Networks, objective and training of scMM. Defaults are those of the authors' tutorial."""

    max_epochs: int = Field(
        50, title="Epochs at most", unit="epochs", tier="basic", ge=1, le=100_000,
        help="Training ends here at the latest. An epoch sees every cell once.",
    )
    batch_size: int = Field(
        32, title="Minibatch", unit="cells", tier="basic", ge=2, le=65_536,
        help="Cells in one training step. Larger ones need more memory and fewer steps.",
    )
    lr: float = Field(
        1e-4, title="Learning rate", tier="advanced", gt=0, le=1.0, help="Size of the optimiser's steps.",
    )
    weight_decay: float = Field(
        0.0, title="Weight decay", tier="expert", ge=0, le=1.0, help="Pull of the weights towards zero; scMM has none.",
    )
    validation_fraction: float = Field(
        0.2, title="Cells kept for validation", tier="advanced", ge=0, le=0.5,
        help="Share of the cells of each batch that training does not see; early stopping watches them.",
    )
    patience: int = Field(
        10, title="Patience", unit="epochs", tier="advanced", ge=0,
        help="Stop when the validation loss has not improved for this many epochs; 0 = never stop early.",
    )
    min_epochs: int = Field(
        25, title="Epochs at least", unit="epochs", tier="expert", ge=0,
        help="No early stop before this epoch; at least the warm-up of the KL term.",
    )
    dim: int = Field(
        10, title="Latent dimensions", unit="dimensions", tier="basic", ge=2, le=512,
        help="Size of the embedding. Each dimension is one program of features in the report of programs.",
    )
    layers: int = Field(
        2, title="Hidden layers", tier="advanced", ge=1, le=10, help="Hidden layers of each encoder and each decoder.",
    )
    hidden_rna: int = Field(
        100, title="Width for RNA", tier="advanced", ge=4, le=16_384, help="Hidden units of the RNA networks.",
    )
    hidden_other: int = Field(
        20, title="Width for other modalities", tier="advanced", ge=4, le=16_384,
        help="Hidden units of the networks of protein and ATAC.",
    )
    posterior: Literal["laplace", "gaussian"] = Field(
        "laplace", title="Posterior and prior", tier="expert",
        help="laplace: as published; each cell has the same total uncertainty, shared out among the dimensions. "
        "gaussian: the usual normal distribution, without that budget.",
    )
    learn_prior: bool = Field(
        True, title="Learn the prior's scale", tier="expert", help="Learn how wide the prior is in each dimension.",
    )
    kl_warmup: int = Field(
        25, title="Warm-up of the KL term", unit="epochs", tier="expert", ge=0,
        help="The KL term's weight grows from 0 to 1 over this many epochs; 0 = it is 1 at once.",
    )
    rna_weight: float = Field(
        1.0, title="Weight of the RNA reconstruction", tier="expert", gt=0,
        help="Multiplies the likelihood of RNA in the objective.",
    )
    cross: Literal["all", "sampled"] = Field(
        "all", title="Reconstructions of a step", tier="expert",
        help="all: every modality from every other; sampled: every modality from one drawn at random (faster with "
        "three or more modalities, noisier).",
    )
    batch_in: Literal["none", "decoder", "both"] = Field(
        "both", title="Batch enters", tier="advanced",
        help="Where the networks are told the batch: nowhere, the decoders, or encoders and decoders. Extension; "
        "without effect if there is a single batch.",
    )
    data_bias: bool = Field(
        False, title="Start at the data's means", tier="expert",
        help="Start the decoders at the mean of every feature instead of at 1 in 10,000. Changes the start alone.",
    )
    log_input: bool = Field(
        False, title="Logarithm of the input", tier="expert",
        help="Encoders see log(1 + normalised counts) instead of normalised counts. Extension.",
    )
    input_dropout: float = Field(
        0.0, title="Hidden input", tier="advanced", ge=0, lt=1,
        help="Share of the non-zero values of RNA and ATAC that encoders do not get to see in a training step, so that "
        "they do not learn single cells by heart. Protein panels are small and are seen whole. Extension; 0 = off.",
    )
    alignment: float = Field(
        0.0, title="Weight of the alignment", tier="advanced", ge=0,
        help="How closely the states that each modality alone gives a cell must agree. Extension; 0 = off, as "
        "published.",
    )
    library: Literal["observed", "median", "ratio", "number"] = Field(
        "observed", title="Depth of decoded values", tier="advanced",
        help="Total count that decoded values are scaled to. observed: the cell's own where the modality was an input, "
        "the median of the training data elsewhere; median: always the median; ratio: own for inputs, elsewhere the "
        "input's depth times the usual ratio of both; number: always the number below. The depth of a modality that "
        "was no input is never looked at.",
    )
    library_size: float = Field(
        10_000.0, title="Depth, as a number", unit="counts", tier="expert", gt=0,
        help="Total count of decoded values when the depth is a number.",
    )
    sampler: Literal["mixed", "stratified", "one batch"] = Field(
        "mixed", title="Cells of a minibatch", tier="expert",
        help="mixed: from all cells alike, as published; stratified: as many cells of every batch; one batch: a "
        "single batch a minibatch.",
    )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """``paper`` (the authors' tutorial) and ``fast`` (ours: wider, Gaussian, with the two extensions)."""
        return {
            "paper": {},
            "fast": {
                "max_epochs": 60,
                "batch_size": 256,
                "lr": 2e-3,
                "lr_schedule": "cosine",
                "warmup_steps": 50,
                "kl_warmup": 10,
                "min_epochs": 20,
                "validation_fraction": 0.05,
                "average_weights": 0.995,
                "dim": 20,
                "hidden_rna": 128,
                "hidden_other": 128,
                "posterior": "gaussian",
                "data_bias": True,
                "log_input": True,
                "input_dropout": 0.3,
                "alignment": 10.0,
                "batch_in": "decoder",
            },
        }

    @classmethod
    def supports(cls, pattern: Pattern) -> Verdict:
        """Mosaics whose modalities are connected by paired cells (sheet, section 1).

        A batch pairs two modalities if their cells must overlap: more cells have one or the other, counted together,
        than the batch has.
        """
        if not pattern.batches or not pattern.tiles:
            return Verdict(level="cannot", reasons=("There is no measured tile.",))
        modalities = list(dict.fromkeys(tile.modality for tile in pattern.tiles))
        unknown = [m for m in modalities if m not in KNOWN]
        if unknown:
            return Verdict(
                level="cannot",
                reasons=(f"scMM has no likelihood for {', '.join(unknown)}; it knows rna, adt and atac.",),
            )
        groups = _paired_groups(pattern, modalities)
        if len(groups) > 1:
            largest = max(groups, key=len)
            apart = [m for m in modalities if m not in largest]
            return Verdict(
                level="cannot",
                reasons=(
                    f"No cell has both {', '.join(apart)} and {' or '.join(m for m in modalities if m in largest)}: "
                    "scMM aligns modalities by paired cells alone.",
                ),
            )
        reasons = []
        if len(modalities) == 1:
            reasons.append("There is a single modality: scMM is then a plain variational autoencoder.")
        kinds = {frozenset(pattern.measured(batch)) for batch in pattern.batches}
        if len(kinds) > 1:
            reasons.append(
                "Batches differ in their modalities. The published method knows paired cells only; cells that lack a "
                "modality train the networks of those that they have."
            )
        return Verdict(level="limits" if reasons else "fits", reasons=tuple(reasons))


def _paired_groups(pattern: Pattern, modalities: list[str]) -> list[set[str]]:
    """Modalities connected through paired cells."""
    group = {m: {m} for m in modalities}
    for batch in pattern.batches:
        cells = {tile.modality: tile.n_cells for tile in pattern.tiles if tile.batch == batch}
        for one, other in combinations(cells, 2):
            if cells[one] + cells[other] > pattern.n_cells[batch] and group[one] is not group[other]:
                joined = group[one] | group[other]
                group.update(dict.fromkeys(joined, joined))
    return list({id(found): found for found in group.values()}.values())
