"""What every method's configuration shares: training, precision, sampling, and what the run is to answer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from headless.data.pattern import Pattern, Verdict
from headless.schema import Config, Field


class ModelConfig(Config):
    """Base of the configurations of all methods (torch-free)."""

    max_epochs: int = Field(
        200, title="Epochs at most", unit="epochs", tier="basic", ge=1, le=100_000,
        help="Training ends here at the latest. An epoch is one tour of the sampler over the data.",
    )
    batch_size: int = Field(
        256, title="Minibatch", unit="cells", tier="basic", ge=2, le=65_536,
        help="Cells in one training step. Larger ones need more memory and fewer steps.",
    )
    lr: float = Field(
        1e-3, title="Learning rate", tier="advanced", gt=0, le=1.0,
        help="Size of the optimiser's steps. Lower it when training diverges.",
    )
    weight_decay: float = Field(
        0.01, title="Weight decay", tier="expert", ge=0, le=1.0,
        help="Pull of the weights towards zero (decoupled, as in AdamW).",
    )
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", title="Schedule of the rate", tier="expert",
        help="Constant, or a short warm-up followed by a cosine down to 1 % of the rate at the last epoch.",
    )
    warmup_steps: int = Field(
        0, title="Warm-up", unit="steps", tier="expert", ge=0,
        help="Steps in which the rate grows from 0 (cosine only).",
    )
    gradient_clip: float | None = Field(
        None, title="Gradient clipping", tier="expert", gt=0, help="Largest norm of the gradient; empty = no clipping.",
    )
    average_weights: float = Field(
        0.0, title="Averaged weights", tier="expert", ge=0, lt=1,
        help="Decay of an exponential moving average of the weights, used for the results; 0 = off.",
    )
    max_steps: int | None = Field(
        None, title="Steps at most", unit="steps", tier="advanced", ge=1,
        help="Training ends after this many steps even if epochs are left; empty = epochs alone decide.",
    )
    validation_fraction: float = Field(
        0.0, title="Cells kept for validation", tier="advanced", ge=0, le=0.5,
        help="Share of the cells of each batch that training does not see; the validation curve and early stopping "
        "use them.",
    )
    patience: int = Field(
        0, title="Patience", unit="epochs", tier="advanced", ge=0,
        help="Stop when the validation loss has not improved for this many epochs; 0 = never stop early.",
    )
    min_epochs: int = Field(
        0, title="Epochs at least", unit="epochs", tier="expert", ge=0, help="No early stop before this epoch.",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", title="Precision", tier="expert",
        help="auto: bf16 products on a GPU that has them, float32 elsewhere. Losses are always float32.",
    )
    checkpoint_every: int = Field(
        20, title="Checkpoint every", unit="epochs", tier="expert", ge=1,
        help="How often training is saved; at most this much is lost in a crash. A checkpoint is also written every "
        "minute or so.",
    )

    @classmethod
    @abstractmethod
    def supports(cls, pattern: Pattern) -> Verdict:
        """Can the method train on a mosaic of this pattern, and if not (fully), why not."""
