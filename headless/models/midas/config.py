"""Settings of MIDAS (He et al., Nature Biotechnology 2024)."""

from __future__ import annotations

from typing import Any, Literal

from headless.data.pattern import Pattern, Verdict
from headless.models.config import ModelConfig
from headless.schema import Field

#: The authors' advice: fewer cells in a batch than this give a weak technical state u.
ADVISED_CELLS = 5_000


class MidasConfig(ModelConfig):
    """Networks, weights of the objective and training of MIDAS. Defaults are those of the paper."""

    max_epochs: int = Field(
        2000, title="Epochs at most", unit="epochs", tier="basic", ge=1, le=100_000,
        help="Training ends here at the latest. In an epoch each batch is visited as often as the largest one needs.",
    )
    lr: float = Field(
        1e-4, title="Learning rate", tier="advanced", gt=0, le=1.0,
        help="Size of the optimiser's steps, for the network and for the discriminators.",
    )
    dim_c: int = Field(
        32, title="Biological dimensions", unit="dimensions", tier="basic", ge=2, le=512,
        help="Size of c, the biological state: the embedding that is shown and clustered.",
    )
    dim_u: int = Field(
        2, title="Technical dimensions", unit="dimensions", tier="advanced", ge=1, le=64,
        help="Size of u, the technical state: it should tell batches apart and nothing else.",
    )
    data_hidden: int = Field(
        1024, title="Width next to the data", tier="expert", ge=8, le=16_384,
        help="Hidden units of each modality's encoder and of the last hidden layer of the decoder.",
    )
    trunk_hidden: tuple[int, ...] = Field(
        (128,), title="Widths of the trunk", tier="expert", min_length=1,
        help="Hidden layers shared by all modalities, from the data to the latent state.",
    )
    chunk_hidden: tuple[int, ...] = Field(
        (128,), title="Widths of a chromosome's network", tier="expert", min_length=1,
        help="Hidden layers of the network that each chromosome's peaks have of their own.",
    )
    chunk_out: int = Field(
        32, title="Summary of a chromosome", tier="expert", ge=1, le=1024,
        help="Numbers that a chromosome's network hands on.",
    )
    dropout: float = Field(
        0.2, title="Dropout", tier="expert", ge=0, lt=1, help="Share of hidden units left out at random.",
    )
    batch_expert_dropout: float = Field(
        0.1, title="Steps without the batch expert", tier="expert", ge=0, le=1,
        help="Share of training steps in which the posterior does not see which batch a cell is from.",
    )
    modality_dropout: float = Field(
        0.0, title="Cells shown one modality", tier="expert", ge=0, le=1,
        help="Share of cells that training encodes from one of their modalities while it decodes all: teaches "
        "translation and imputation (an extension; 0 = as published).",
    )
    weight_batch: float = Field(
        1004.0, title="Weight of the batch reconstruction", tier="expert", ge=0,
        help="How much u must tell the batch. 1004 as in the paper's code, 1000 in the published package.",
    )
    weight_kl_c: float = Field(
        1.0, title="Weight of the KL term of c", tier="expert", ge=0, help="Pull of c to the prior.",
    )
    weight_kl_u: float = Field(
        5.0, title="Weight of the KL term of u", tier="expert", ge=0,
        help="Pull of u to the prior; above 1 it is the technical information bottleneck.",
    )
    weight_alignment: float = Field(
        50.0, title="Weight of the alignment", tier="advanced", ge=0,
        help="How closely the latent states that each modality alone gives a cell must agree.",
    )
    weight_adversarial: float = Field(
        30.0, title="Weight of the adversary", tier="advanced", ge=0,
        help="How hard c is pushed to hide the batch. Raise it if batches stay apart, lower it if cell types merge.",
    )
    discriminator_steps: int = Field(
        3, title="Discriminator steps", tier="expert", ge=0, le=100,
        help="Steps of the discriminators before each step of the network.",
    )
    sampler: Literal["one batch", "mixed", "stratified"] = Field(
        "one batch", title="Cells of a minibatch", tier="expert",
        help="One batch a minibatch, as published; mixed and stratified change how the adversary works.",
    )
    cells_per_epoch: int = Field(
        10_000, title="Cells of a batch per epoch", unit="cells", tier="expert", ge=2,
        help="Larger batches give at most this many cells an epoch, so that all batches weigh the same.",
    )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """``paper``, ``package`` (published package), ``large`` (paper's wide variant), ``fast`` (ours)."""
        return {
            "paper": {},
            "package": {"weight_batch": 1000.0},
            "large": {"dim_c": 64, "chunk_hidden": (512, 128), "trunk_hidden": (256,)},
            # Chosen on a mosaic of blood in which RNA or protein is missing in most cells.
            "fast": {
                "lr": 2e-3,
                "lr_schedule": "cosine",
                "warmup_steps": 100,
                "max_steps": 4000,
                "sampler": "mixed",
                "dropout": 0.15,
                "modality_dropout": 0.5,
            },
        }

    @classmethod
    def supports(cls, pattern: Pattern) -> Verdict:
        """Any mosaic with at least one batch; limits are said (sheet, section 1)."""
        if not pattern.batches or not pattern.tiles:
            return Verdict(level="cannot", reasons=("There is no measured tile.",))
        unknown = [m for m in pattern.modalities if m not in ("rna", "adt", "atac")]
        if unknown:
            return Verdict(
                level="cannot",
                reasons=(f"MIDAS has no likelihood for {', '.join(unknown)}; it knows rna, adt and atac.",),
            )
        reasons = []
        small = [batch for batch in pattern.batches if pattern.n_cells[batch] < ADVISED_CELLS]
        if small:
            shown = ", ".join(small[:4]) + (" ..." if len(small) > 4 else "")
            reasons.append(
                f"{len(small)} of {len(pattern.batches)} batches have fewer than {ADVISED_CELLS} cells ({shown}): "
                "the authors advise more."
            )
        if len(pattern.batches) == 1:
            reasons.append("There is a single batch: the technical state u and batch correction mean nothing.")
        groups = pattern.bridges()
        if len(groups) > 1:
            named = "; ".join(", ".join(sorted(group)) for group in groups)
            reasons.append(
                f"No modality bridges these groups of batches: {named}. MIDAS trains, but integrates such diagonal "
                "data weakly."
            )
        return Verdict(level="limits" if reasons else "fits", reasons=tuple(reasons))
