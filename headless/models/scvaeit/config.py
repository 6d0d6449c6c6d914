"""Settings of scVAEIT (Du, Cai and Roeder, PNAS 2022)."""

from __future__ import annotations

from typing import Any, Literal

from headless.data.pattern import Pattern, Verdict
from headless.models.config import ModelConfig
from headless.schema import Field


class ScVaeitConfig(ModelConfig):
    """Networks, masks, weights of the objective and training of scVAEIT. Defaults are those of the preset ``paper``."""

    max_epochs: int = Field(
        300, title="Epochs at most", unit="epochs", tier="basic", ge=1, le=100_000,
        help="Training ends here at the latest. An epoch is one tour of the sampler over the data.",
    )
    batch_size: int = Field(
        512, title="Minibatch", unit="cells", tier="basic", ge=2, le=65_536,
        help="Cells in one training step. Larger ones need more memory and fewer steps.",
    )
    weight_decay: float = Field(
        0.1, title="Weight decay", tier="expert", ge=0, le=1.0,
        help="Pull of the weights towards zero; a step takes rate times this (1e-4 a step, as published).",
    )
    n_latent: int = Field(
        32, title="Latent dimensions", unit="dimensions", tier="basic", ge=2, le=512,
        help="Size of the embedding that is shown and clustered.",
    )
    hidden: tuple[int, ...] = Field(
        (256,), title="Widths of the trunk", tier="expert", min_length=1,
        help="Hidden layers shared by all modalities, from the data to the latent state; the decoder mirrors them.",
    )
    rna_width: int = Field(
        256, title="Width next to the genes", tier="expert", ge=1, le=16_384,
        help="Hidden units between the genes and the trunk, on both sides. Also for peaks without chromosomes.",
    )
    adt_width: int = Field(
        128, title="Width next to the proteins", tier="expert", ge=1, le=16_384,
        help="Hidden units between the proteins and the trunk, on both sides.",
    )
    chunk_width: int = Field(
        16, title="Width next to a chromosome's peaks", tier="expert", ge=1, le=4096,
        help="Hidden units that each chromosome's peaks have of their own, on both sides.",
    )
    rna_mask: int = Field(
        32, title="Summary of missing genes", tier="expert", ge=1, le=1024,
        help="Numbers that tell the network which genes are missing. Also for peaks without chromosomes.",
    )
    adt_mask: int = Field(
        16, title="Summary of missing proteins", tier="expert", ge=1, le=1024,
        help="Numbers that tell the network which proteins are missing.",
    )
    chunk_mask: int = Field(
        2, title="Summary of a chromosome's missing peaks", tier="expert", ge=1, le=256,
        help="Numbers that tell the network which peaks of a chromosome are missing.",
    )
    norm_shift: bool = Field(
        True, title="Shift in normalisation", tier="expert",
        help="Batch normalisation learns a shift besides a scale. The paper's code has none.",
    )
    skip: bool = Field(
        True, title="Decoder sees visible data", tier="advanced",
        help="Features that are there help directly, besides the latent state, to predict those that are not. In our "
        "tests it set cells apart by what was measured in them (see the preset fast).",
    )
    covariates: tuple[str, ...] = Field(
        (), title="Covariates", tier="advanced",
        help="Columns of the table of cells that the network is told besides the batch: categories or numbers.",
    )
    batch_covariate: Literal["encoder and decoder", "decoder", "none"] = Field(
        "encoder and decoder", title="Who is told the batch", tier="advanced",
        help="With several batches: both networks, the decoder alone, or none. Told nothing of it, the encoder cannot "
        "set batches apart that differ in nothing but what was measured.",
    )
    nb_target: Literal["counts", "lognorm"] = Field(
        "counts", title="What genes and proteins are compared with", tier="expert",
        help="counts: raw counts at the cell's depth. lognorm: log-normalised values, as in the published code.",
    )
    head_range: Literal["ln 10001", "largest value"] = Field(
        "ln 10001", title="Top of the predicted scale", tier="expert",
        help="Largest log-normalised value that can be predicted: all of the cell's counts in one feature, or the "
        "largest value among the training cells (as in the published package).",
    )
    objective: Literal["description", "package"] = Field(
        "description", title="Objective", tier="expert",
        help="As the paper describes it, or as the published package computes it.",
    )
    hidden_sample: Literal["full", "visible", "both"] = Field(
        "full", title="Latent state that predicts hidden values", tier="expert",
        help="Drawn given all of a cell's data, given its visible part (as in use), or each in turn.",
    )
    visible_sets: Literal["one hidden", "any", "all"] = Field(
        "one hidden", title="Modalities hidden in training", tier="advanced",
        help="one hidden: one modality of each cell that has several. any: any set that leaves one. all: none.",
    )
    p_feat: float = Field(
        0.2, title="Features hidden in training", tier="advanced", ge=0, le=1,
        help="Share of the features hidden on purpose, in every second cell. Raise it for panels with gaps.",
    )
    beta: float = Field(
        2 / 3, title="Weight of hidden values", tier="advanced", ge=0, le=1,
        help="Weight of predicting what is hidden; the rest goes to reconstructing what is visible.",
    )
    weight_kl: float = Field(
        1.0, title="Weight of the agreement", tier="advanced", ge=0,
        help="How closely the latent states given all and given the visible part of a cell must agree.",
    )
    weight_prior: float = Field(
        0.0, title="Weight of a normal prior", tier="expert", ge=0,
        help="Pull of the latent state given the visible part to N(0, 1). 0 as published.",
    )
    beta_reverse: float = Field(
        0.0, title="Share of the reverse task", tier="expert", ge=0, le=1,
        help="Package's objective only: share of predicting the visible part from the hidden one.",
    )
    mmd_weight: float = Field(
        0.0, title="Weight of the mixing of groups", tier="advanced", ge=0,
        help="Pull of batches, and of levels of categorical covariates, to one distribution in the latent state (MMD). "
        "Raise it if batches stay apart.",
    )
    mmd_decay: float = Field(
        1.0, title="Decay of the mixing weight", tier="expert", gt=0, le=1,
        help="What the mixing weight is multiplied with every 50 epochs.",
    )
    modality_weights: dict[str, float] = Field(
        {}, title="Weights of modalities", tier="advanced",
        help="Weight of each modality's loss by name; empty = automatic: so that all weigh the same.",
    )
    weights_after: int = Field(
        200, title="Steps before automatic weights", unit="steps", tier="expert", ge=1,
        help="Steps in which the losses of modalities are measured; then their weights are set and kept.",
    )
    informed_start: bool = Field(
        False, title="Start at the mean", tier="expert",
        help="The untrained network predicts each feature's mean over the training cells. Off as published.",
    )
    sampler: Literal["mixed", "stratified", "one batch"] = Field(
        "mixed", title="Cells of a minibatch", tier="expert",
        help="Drawn from all cells alike, the same number from each batch, or from one batch.",
    )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """``paper`` (the description), ``package`` (PyPI 1.1.1), ``paper-code`` (v0.0.0-supp), ``fast`` (ours)."""
        package = {
            "objective": "package",
            "nb_target": "lognorm",
            "skip": False,
        }
        return {
            "paper": {},
            "package": package
            | {
                "head_range": "largest value",
                "lr": 3e-4,
                "weight_decay": 1e-4,
                "batch_size": 256,
                "max_epochs": 200,
                "beta": 0.5,
                "weight_kl": 2.0,
                "modality_weights": {"rna": 1.0, "adt": 1.0, "atac": 1.0},
            },
            "paper-code": package
            | {
                "norm_shift": False,
                "weight_kl": 1.0,
                "modality_weights": {"rna": 0.15, "adt": 0.83, "atac": 0.02},
            },
            # Measured on a blood mosaic (RNA and protein, 600 steps): with the skip on, cells stand apart by what was
            # measured (neighbours of one group; iLISI .04 against .34) and hidden proteins are predicted worse (.81
            # against .84); the batch told to the decoder alone costs as much. A higher rate and a weaker agreement
            # bring .86.
            "fast": {
                "lr": 4e-3,
                "lr_schedule": "cosine",
                "warmup_steps": 50,
                "max_steps": 1500,
                "skip": False,
                "batch_covariate": "none",
                "weight_kl": 0.25,
                "informed_start": True,
            },
        }

    @classmethod
    def supports(cls, pattern: Pattern) -> Verdict:
        """Any mosaic of RNA, protein and ATAC; unlinked groups and patterns never seen in training are said."""
        if not pattern.batches or not pattern.tiles:
            return Verdict(level="cannot", reasons=("There is no measured tile.",))
        unknown = [m for m in pattern.modalities if m not in ("rna", "adt", "atac")]
        if unknown:
            return Verdict(
                level="cannot",
                reasons=(f"scVAEIT has no likelihood for {', '.join(unknown)}; it knows rna, adt and atac.",),
            )
        poor = [batch for batch in pattern.batches if sum(t.n_features for t in pattern.tiles if t.batch == batch) < 2]
        if poor:
            return Verdict(
                level="cannot", reasons=(f"Batch {poor[0]} has fewer than two measured features; one must be hidden.",)
            )
        reasons = []
        groups = pattern.bridges()
        if len(groups) > 1:
            named = "; ".join(", ".join(sorted(group)) for group in groups)
            reasons.append(
                f"No modality links these groups of batches: {named}. scVAEIT trains, but nothing aligns them."
            )
        if any(len(pattern.measured(batch)) > 2 for batch in pattern.batches):
            reasons.append(
                "Cells with three modalities: training hides one modality at a time, so predicting two from one is "
                "not practised unless visible_sets is 'any'."
            )
        return Verdict(level="limits" if reasons else "fits", reasons=tuple(reasons))
