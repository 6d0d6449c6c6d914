"""Settings of Multigrate (Lotfollahi, Litinetskaya and Theis, bioRxiv 2022.03.16.484643)."""

from __future__ import annotations

from typing import Any, Literal

from headless.data.pattern import Pattern, Verdict
from headless.models.config import ModelConfig
from headless.schema import Field


class MultigrateConfig(ModelConfig):
    """Networks, weights of the objective and training of Multigrate. Defaults are those of the paper."""

    lr: float = Field(
        5e-4, title="Learning rate", tier="advanced", gt=0, le=1.0, help="Size of the optimiser's steps.",
    )
    weight_decay: float = Field(
        1e-3, title="Weight decay", tier="expert", ge=0, le=1.0, help="Pull of the weights towards zero (AdamW).",
    )
    validation_fraction: float = Field(
        0.1, title="Cells kept for validation", tier="advanced", ge=0, le=0.5,
        help="Share of the cells of each batch that training does not see; early stopping uses them.",
    )
    patience: int = Field(
        10, title="Patience", unit="epochs", tier="advanced", ge=0,
        help="Stop when the validation reconstruction has not improved for this many epochs; 0 = never stop early.",
    )
    dim_z: int = Field(
        16, title="Latent dimensions", unit="dimensions", tier="basic", ge=2, le=512,
        help="Size of the embedding that is shown and clustered.",
    )
    hidden: int = Field(128, title="Hidden width", tier="expert", ge=8, le=8192, help="Hidden units of each layer.")
    dim_condition: int = Field(
        16, title="Width of a covariate", tier="expert", ge=1, le=256,
        help="Numbers that stand for the batch, and for each further covariate, in encoders and decoders.",
    )
    conditions: Literal["encoder and decoder", "decoder", "none"] = Field(
        "encoder and decoder", title="Tell the networks the batch", tier="advanced",
        help="Networks that know the batch and the covariates of a cell leave them out of the latent state. Told to "
        "the decoder alone, cells of all batches are encoded alike, but a query cannot be mapped.",
    )
    covariates: tuple[str, ...] = Field(
        (), title="Further covariates", tier="advanced",
        help="Columns of the table of cells to condition on: text columns as categories, numbers as curves.",
    )
    curve: Literal["sigmoid", "log sigmoid", "network"] = Field(
        "sigmoid", title="Curve of a continuous covariate", tier="expert",
        help="How a number scales its vector: a sigmoid of it, of its logarithm (positive numbers only), or a small "
        "network.",
    )
    shared_decoder: bool = Field(
        True, title="Shared decoder", tier="expert",
        help="A first layer shared by the decoders of all modalities, as in the paper; the package has none.",
    )
    normalization: Literal["layer", "batch"] = Field(
        "layer", title="Normalisation", tier="expert", help="Layer or batch normalisation between layers.",
    )
    dropout: float = Field(
        0.2, title="Dropout", tier="expert", ge=0, lt=1, help="Share of hidden units left out at random.",
    )
    mix: Literal["product", "mixture"] = Field(
        "product", title="How modalities are combined", tier="expert",
        help="Product of experts (the published choice), or their average.",
    )
    rna: Literal["nb", "zinb", "mse"] = Field(
        "nb", title="RNA likelihood", tier="advanced",
        help="Negative binomial on counts, with extra zeros, or squared error on log-normalised values.",
    )
    adt: Literal["nb", "mse"] = Field(
        "mse", title="Protein likelihood", tier="advanced",
        help="Squared error on centred log ratios (the paper), or negative binomial on counts.",
    )
    atac: Literal["bce", "mse"] = Field(
        "mse", title="ATAC likelihood", tier="advanced",
        help="Squared error on log-normalised accessibility (the paper), or open and closed peaks.",
    )
    encoder_input: Literal["log1p", "raw"] = Field(
        "log1p", title="Counts at the encoder", tier="expert",
        help="Logarithms of counts (stable), or raw counts as in the published package.",
    )
    library: Literal["observed", "median", "10000"] = Field(
        "observed", title="Library size of decoded counts", tier="advanced",
        help="The cell's own where it was measured and the median elsewhere; the median for all cells; or 10,000.",
    )
    alignment: Literal["latent", "marginal", "both", "none"] = Field(
        "latent", title="Alignment", tier="advanced",
        help="What is made alike: joint latent states of the batches, the states from each modality alone, or both.",
    )
    weight_alignment: float = Field(
        500.0, title="Weight of the alignment", tier="basic", ge=0,
        help="How strongly batches are mixed (MMD). Raise it if batches stay apart, lower it if cell types merge; "
        "100 to 10,000 are usual.",
    )
    alignment_scale: Literal["raw", "unit"] = Field(
        "raw", title="Scale of the alignment", tier="expert",
        help="Align drawn states as they are, summed over pairs of batches (published); or posterior means in units of "
        "their spread, averaged over pairs, so that nothing is gained by shrinking or blurring them (an extension).",
    )
    weight_pairs: float = Field(
        0.0, title="Weight of agreement in a cell", tier="advanced", ge=0,
        help="How closely the states that each modality alone gives a cell must agree (an extension; 0 = as "
        "published).",
    )
    modality_dropout: float = Field(
        0.0, title="Cells shown one modality", tier="advanced", ge=0, le=1,
        help="Share of cells that training encodes from one of their modalities while it decodes all: teaches "
        "translation and imputation (an extension; 0 = as published).",
    )
    weight_kl: float = Field(
        1e-5, title="Weight of the KL term", tier="expert", ge=0, help="Pull of the latent states to the prior.",
    )
    weight_rna: float = Field(1.0, title="Weight of RNA", tier="expert", ge=0, help="Weight of its reconstruction.")
    weight_adt: float = Field(1.0, title="Weight of protein", tier="expert", ge=0, help="Weight of its reconstruction.")
    weight_atac: float = Field(1.0, title="Weight of ATAC", tier="expert", ge=0, help="Weight of its reconstruction.")
    theta_start: Literal["zero", "normal"] = Field(
        "zero", title="Start of the dispersion", tier="expert", help="0, or drawn from N(0, 1) as in the package.",
    )
    sampler: Literal["stratified", "two batches", "mixed"] = Field(
        "stratified", title="Cells of a minibatch", tier="expert",
        help="All batches in equal shares, chunks of two batches (the package), or cells drawn alike.",
    )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """``paper``, ``package`` (published code), ``fast`` (ours)."""
        return {
            "paper": {},
            "package": {
                "shared_decoder": False,
                "encoder_input": "raw",
                "theta_start": "normal",
                "sampler": "two batches",
            },
            # Chosen on a mosaic of blood in which RNA or protein is missing in most cells.
            "fast": {
                "lr": 2e-3,
                "lr_schedule": "cosine",
                "warmup_steps": 50,
                "max_steps": 3000,
                "validation_fraction": 0.0,
                "patience": 0,
                "dim_z": 32,
                "hidden": 256,
                "dropout": 0.1,
                "conditions": "decoder",
                "atac": "bce",
                "modality_dropout": 0.5,
                "alignment_scale": "unit",
                "weight_alignment": 3000.0,
                "weight_pairs": 30.0,
                "weight_adt": 100.0,
                "weight_kl": 0.1,
            },
        }

    @classmethod
    def supports(cls, pattern: Pattern) -> Verdict:
        """Any mosaic with a measured tile; limits are said (sheet, section 1)."""
        if not pattern.batches or not pattern.tiles:
            return Verdict(level="cannot", reasons=("There is no measured tile.",))
        reasons = []
        groups = pattern.bridges()
        if len(groups) > 1:
            named = "; ".join(", ".join(sorted(group)) for group in groups)
            reasons.append(
                f"No modality bridges these groups of batches: {named}. Multigrate trains, but only the alignment "
                "holds them together, which is weak."
            )
        if len(pattern.batches) == 1:
            reasons.append("There is a single batch: alignment and batch correction mean nothing.")
        return Verdict(level="limits" if reasons else "fits", reasons=tuple(reasons))
