"""Multigrate: product of experts over the modalities of a cell, batches aligned by maximum mean discrepancy.

Lotfollahi, Litinetskaya and Theis, "Multigrate: single-cell multi-omic data integration", bioRxiv 2022.03.16.484643.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headless.data.minibatch import Minibatch, TileRows
from headless.data.mosaic import Layout
from headless.errors import MosaicError
from headless.models.alignment import mmd
from headless.models.base import Module, OptimizerSpec, Posterior
from headless.models.count_likelihoods import NegativeBinomial, ZeroInflatedNB
from headless.models.counts_input import (
    centred_log_ratio,
    geometric_size,
    log_counts,
    log_normalised,
    median_sizes,
)
from headless.models.experts import gaussian_kl, keep_some, product_of_experts, reparametrise
from headless.models.likelihoods import Bernoulli, Likelihood, SquaredError
from headless.models.multigrate.config import MultigrateConfig
from headless.models.multigrate.networks import Conditions, Decoder, Encoder, log_proportions

#: Log-variances stay in [-10, 10]; unbounded ones make the original diverge.
LIMIT = 10.0


@dataclass
class Expert:
    """What one modality says: mean and log-variance ``(m, z)`` of the cells ``rows`` (``None`` = all)."""

    mean: Tensor
    log_variance: Tensor
    rows: Tensor | None

    def place(self, values: Tensor, n: int) -> Tensor:
        """``(n, z)`` with zeros where a cell lacks the modality."""
        return values if self.rows is None else values.new_zeros(n, values.shape[1]).index_copy(0, self.rows, values)


class Multigrate(Module):
    """The network and the objective of Multigrate.

    Parameters
    ----------
    config
        Widths, likelihoods, weights and training.
    layout
        Batches, modalities, features and covariates of the mosaic. Batches are the groups that are aligned.
    """

    config: MultigrateConfig

    def __init__(self, config: MultigrateConfig, layout: Layout) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.parts = {"z": slice(0, config.dim_z)}
        self.biological = "z"
        self.kl_warmth = 0.0
        #: Number of batches whose conditions are frozen (those of the reference, in query mapping).
        self.frozen_batches = 0
        self.likelihoods = {m: getattr(config, m, "mse") for m in layout.modalities}
        n_batches = len(layout.batches)
        aligned = n_batches > 1
        told = config.conditions != "none"
        self.conditions = Conditions(n_batches if aligned and told else 0, layout.covariates if told else (), config)
        width = self.conditions.width
        seen = width if config.conditions == "encoder and decoder" else 0
        self.encoders = nn.ModuleDict({m: Encoder(layout.n_features(m), seen, config) for m in layout.modalities})
        n_in, depth = config.dim_z, 2
        self.shared = None
        if config.shared_decoder:
            self.shared = Decoder(config.dim_z, width, 1, 1, 0, config)
            n_in, depth = config.hidden, 1
        self.decoders = nn.ModuleDict(
            {
                m: Decoder(n_in, width, depth, layout.n_features(m), 1 + (kind == "zinb"), config)
                for m, kind in self.likelihoods.items()
            }
        )
        start = torch.randn if config.theta_start == "normal" else torch.zeros
        self.log_theta = nn.ParameterDict(
            {
                m: nn.Parameter(start(n_batches if aligned else 1, layout.n_features(m)))
                for m, kind in self.likelihoods.items()
                if kind in ("nb", "zinb")
            }
        )
        for m in layout.modalities:
            self.register_buffer(f"_size_{m}", torch.ones(()))
            knows = torch.tensor([b in layout.measured_in[m] for b in layout.batches])
            self.register_buffer(f"_knows_{m}", knows, persistent=False)

    # ---- the contract -------------------------------------------------------------------------------------------

    def prepare(self, batches: Iterable[Minibatch]) -> None:
        """Median library size (geometric size for centred log ratios) of each modality."""
        for m, size in median_sizes(batches, {m: self._size_of(m) for m in self.layout.modalities}).items():
            self.get_buffer(f"_size_{m}").fill_(size)

    def start_epoch(self, epoch: int, step: int, total_steps: int) -> None:
        """The KL term grows from 0 to its weight over the first third of training."""
        third = max(1, self.config.max_epochs // 3)
        self.kl_warmth = min(1.0, max(epoch / third, 3 * step / max(1, total_steps)))

    def extra_state(self) -> dict[str, Any]:
        return {"kl_warmth": self.kl_warmth, "frozen_batches": self.frozen_batches}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.kl_warmth = float(state.get("kl_warmth", 1.0))
        self.frozen_batches = int(state.get("frozen_batches", 0))

    def optimizers(self) -> dict[str, OptimizerSpec]:
        if not self.frozen_batches:
            return super().optimizers()
        # Old rows get no gradient; without decay they keep every bit.
        return {"model": OptimizerSpec(self._condition_weights(), self.config.lr, 0.0)}

    def monitor(self, terms: Mapping[str, float]) -> float:
        """Reconstruction alone: the alignment of a validation minibatch depends on which cells meet in it."""
        return sum(value for key, value in terms.items() if key.startswith("reconstruction"))

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        config, n = self.config, batch.n
        condition = self.conditions(batch.batch, batch.covariates)
        experts = self._experts(batch, condition)
        mean, log_variance = self._joint(experts, n, self._kept(experts, n))
        z = reparametrise(mean, log_variance)
        terms: dict[str, Tensor] = {}
        outputs = self._decoded(z, condition, batch)
        for m, logits in outputs.items():
            x = batch.x[m]
            law = self._likelihood(m, logits, self._codes(batch, x.rows), self._size_of(m)(x), x.mask)
            terms[f"reconstruction_{m}"] = getattr(config, f"weight_{m}", 1.0) * law.nll(x) / n
        terms["kl"] = config.weight_kl * self.kl_warmth * gaussian_kl(mean, log_variance) / n
        aligned, spread = z, z.new_ones(())
        if config.alignment_scale == "unit":
            # In units of the spread of the means, alignment gains nothing from shrinking or blurring the states.
            aligned = mean - mean.mean(0)
            spread = aligned.square().mean().add(1e-8).sqrt()
        if config.alignment != "none" and config.weight_alignment > 0:
            terms["mmd"] = config.weight_alignment * self._alignment(aligned / spread, experts, batch, spread)
        if config.weight_pairs > 0 and len(experts) > 1:
            terms["pairs"] = config.weight_pairs * self._pairs(experts, n) / spread.square() / n
        return terms

    def encode(self, batch: Minibatch, modalities: Sequence[str] | None = None) -> Posterior:
        condition = self.conditions(batch.batch, batch.covariates)
        experts = self._experts(batch, condition)
        wanted = {m: e for m, e in experts.items() if modalities is None or m in modalities}
        if len(wanted) == 1 and modalities is not None:
            # One modality alone answers without the prior.
            ((_, expert),) = wanted.items()
            mean, log_variance = expert.place(expert.mean, batch.n), expert.place(expert.log_variance, batch.n)
        else:
            mean, log_variance = self._joint(wanted, batch.n)
        return Posterior(mean, log_variance, self.parts, self.biological, self._context(batch, wanted))

    def decode(self, latent: Tensor, modality: str, batch: Tensor, context: Tensor | None = None) -> Likelihood:
        sizes = latent.new_full((len(latent),), float("nan"))
        covariates = None
        if context is not None:
            sizes = context[:, self.layout.modalities.index(modality)]
            covariates = context[:, len(self.layout.modalities) :] if self.layout.covariates else None
        typical = self.get_buffer(f"_size_{modality}")
        size = typical.expand(len(latent))
        if self.config.library == "10000" and self.likelihoods[modality] in ("nb", "zinb"):
            size = torch.full_like(sizes, 1e4)
        elif self.config.library == "observed":
            size = torch.where(torch.isnan(sizes), typical, sizes)
        condition = self.conditions(batch, covariates, self._standing_in(modality))
        with self.autocast():
            h = latent if self.shared is None else self.shared.hidden(torch.cat([latent, condition], 1))
            outputs = self.decoders[modality](h, condition)
        return self._likelihood(modality, outputs, batch, size, None)

    def _standing_in(self, modality: str) -> Tensor | None:
        """``(B, B)``: whose condition each batch decodes a modality with; ``None`` if every batch has its own.

        A decoder has never met the condition of a batch that lacks its modality: the mean of those that it knows
        stands in.
        """
        known = self.get_buffer(f"_knows_{modality}")
        if bool(known.all()):
            return None
        return torch.where(known[:, None], torch.eye(len(known), device=known.device), known.float() / known.sum())

    # ---- query mapping ------------------------------------------------------------------------------------------

    def for_query(self, query: Layout) -> Multigrate:
        """This model with conditions for the batches of a query, ready to be trained on them alone (scArches).

        Everything learnt is copied and frozen; only the embedding and the dispersion of the new batches train, so
        cells of the reference encode as before, bit for bit.

        Parameters
        ----------
        query
            Batches of the query, and which modalities they measure; features are those of the reference.

        Raises
        ------
        MosaicError
            ``model.cannot`` if the networks are not told the batch; ``model.other_data`` for other features.
        """
        if self.conditions.batch is None or self.config.conditions != "encoder and decoder":
            raise MosaicError(
                "model.cannot",
                "The encoders of this Multigrate model do not know batches, so they have nothing to learn of new ones.",
                "Train the reference with at least two batches and conditions='encoder and decoder'.",
            )
        mine = self.layout
        for m in query.modalities:
            if tuple(query.features[m]) != tuple(mine.features.get(m, ())):
                raise MosaicError(
                    "model.other_data",
                    f"The {m} features of the query are not those of the reference.",
                    "Prepare the query with the features of the reference.",
                    modality=m,
                )
        measured = {m: [*mine.measured_in[m], *query.measured_in.get(m, ())] for m in mine.modalities}
        layout = replace(
            mine,
            batches=tuple(dict.fromkeys([*mine.batches, *query.batches])),
            measured_in={m: tuple(dict.fromkeys(names)) for m, names in measured.items()},
        )
        grown = Multigrate(self.config, layout)
        weights, known = grown.state_dict(), self.state_dict()
        for name, value in known.items():
            weights[name] = torch.cat([value, weights[name][len(value) :]]) if value.dim() else value
        grown.load_state_dict(weights)
        grown.load_extra_state({**self.extra_state(), "frozen_batches": len(mine.batches)})
        grown.freeze()
        return grown

    def freeze(self) -> None:
        """Let only the conditions of new batches learn."""
        self.requires_grad_(False)
        for weight in self._condition_weights():
            weight.requires_grad_(True)
            weight.register_hook(self._mask_old)  # type: ignore[no-untyped-call]

    def _mask_old(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[: self.frozen_batches] = 0
        return gradient

    def _condition_weights(self) -> list[nn.Parameter]:
        assert self.conditions.batch is not None
        return [self.conditions.batch.weight, *self.log_theta.values()]

    # ---- the parts ----------------------------------------------------------------------------------------------

    def _size_of(self, modality: str) -> Callable[[TileRows], Tensor]:
        clr = modality == "adt" and self.likelihoods[modality] == "mse"
        return geometric_size if clr else _totals

    def _input(self, modality: str, x: TileRows) -> TileRows:
        kind = self.likelihoods[modality]
        if kind == "mse":
            return centred_log_ratio(x) if modality == "adt" else log_normalised(x)
        if kind == "bce":
            return x.with_values((x.values > 0.5).float())
        return log_counts(x) if self.config.encoder_input == "log1p" else x

    def _experts(self, batch: Minibatch, condition: Tensor) -> dict[str, Expert]:
        if not self.training and "experts" in batch.cache:
            cached: dict[str, Expert] = batch.cache["experts"]
            return cached
        experts = {}
        for m, x in batch.x.items():
            if not x.n_rows:
                continue
            with self.autocast():
                out = self.encoders[m](self._input(m, x), condition if x.rows is None else condition[x.rows])
            mean, log_variance = out.float().chunk(2, dim=1)
            experts[m] = Expert(mean, log_variance.clamp(-LIMIT, LIMIT), x.rows)
        if not self.training:
            batch.cache["experts"] = experts
        return experts

    def _kept(self, experts: Mapping[str, Expert], n: int) -> dict[str, Tensor] | None:
        """Modality -> ``(n, 1)``: which cells encode it in this step (``None``: all that have it)."""
        if not self.training or self.config.modality_dropout == 0 or len(experts) < 2:
            return None
        present = torch.cat([e.place(torch.ones_like(e.mean[:, :1]), n) for e in experts.values()], 1) > 0
        kept = keep_some(present, self.config.modality_dropout)
        return {m: kept[:, number, None] for number, m in enumerate(experts)}

    def _joint(
        self, experts: Mapping[str, Expert], n: int, kept: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Product with the prior, or average, of the experts that each cell has (sheet, section 4)."""
        if not experts:
            zeros = torch.zeros(n, self.config.dim_z, device=self._device)
            return zeros, zeros

        def place(m: str, values: Tensor) -> Tensor:
            placed = experts[m].place(values, n)
            return placed if kept is None else placed * kept[m]

        if self.config.mix == "product":
            precisions = {m: torch.exp(-e.log_variance) for m, e in experts.items()}
            return product_of_experts(
                [place(m, precisions[m] * e.mean) for m, e in experts.items()],
                [place(m, precisions[m]) for m in experts],
            )
        number = sum(place(m, torch.ones_like(e.mean)) for m, e in experts.items())
        assert isinstance(number, Tensor)
        share = 1 / number.clamp(min=1)
        mean = share * sum(place(m, e.mean) for m, e in experts.items())
        variance = share.square() * sum(place(m, e.log_variance.exp()) for m, e in experts.items())
        return mean, torch.where(number > 0, variance, torch.ones_like(variance)).log()

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _decoded(self, z: Tensor, condition: Tensor, batch: Minibatch) -> dict[str, list[Tensor]]:
        """Raw outputs for the observed rows of every modality."""
        with self.autocast():
            h = z if self.shared is None else self.shared.hidden(torch.cat([z, condition], 1))
            outputs = {}
            for m, x in batch.x.items():
                if x.n_rows:
                    every = x.rows is None
                    outputs[m] = self.decoders[m](h if every else h[x.rows], condition if every else condition[x.rows])
        return outputs

    def _likelihood(
        self, modality: str, outputs: list[Tensor], batch: Tensor, size: Tensor, mask: Tensor | None
    ) -> Likelihood:
        kind = self.likelihoods[modality]
        if kind == "bce":
            return Bernoulli(outputs[0])
        if kind == "mse":
            g = size[:, None]
            if modality == "adt":
                return SquaredError(outputs[0], centred_log_ratio, lambda v: torch.expm1(v.clamp(min=0)) * g)
            return SquaredError(outputs[0], log_normalised, lambda v: torch.expm1(v.clamp(min=0)) * g / 1e4)
        log_mean = log_proportions(outputs[0], mask) + size.clamp(min=1e-8).log()[:, None]
        law = NegativeBinomial.of_mean(log_mean, self._log_theta(modality, batch))
        return law if kind == "nb" else ZeroInflatedNB(law.total_count, law.logits, outputs[1])

    def _log_theta(self, modality: str, batch: Tensor) -> Tensor:
        """Log inverse dispersion, ``(D,)`` or, of each cell's batch, ``(n, D)``."""
        theta: Tensor = self.log_theta[modality]
        if len(theta) == 1:
            return theta[0]
        # A product with one-hot rows: its gradient is a product too, not a scatter.
        chosen = torch.nn.functional.one_hot(batch, len(theta)).float()
        standing_in = self._standing_in(modality)
        return (chosen if standing_in is None else chosen @ standing_in) @ theta

    def _codes(self, batch: Minibatch, rows: Tensor | None) -> Tensor:
        return batch.batch if rows is None else batch.batch[rows]

    def _alignment(self, z: Tensor, experts: Mapping[str, Expert], batch: Minibatch, spread: Tensor) -> Tensor:
        kind, average = self.config.alignment, self.config.alignment_scale == "unit"
        value = z.new_zeros(())
        if kind in ("latent", "both"):
            value = value + mmd(z, batch.batch, average=average)
        if kind in ("marginal", "both"):
            alone = {m: reparametrise(e.mean, e.log_variance) / spread for m, e in experts.items()}
            for m, e in experts.items():
                value = value + mmd(alone[m], self._codes(batch, e.rows), average=average)
            value = value + self._clouds(alone, experts, batch.n)
        return value

    def _clouds(self, alone: Mapping[str, Tensor], experts: Mapping[str, Expert], n: int) -> Tensor:
        """MMD between the states from each pair of modalities, over the cells that have both (part (a))."""
        names, value = list(experts), next(iter(alone.values())).new_zeros(())
        for number, first in enumerate(names):
            for second in names[number + 1 :]:
                both = _both(experts[first], experts[second], n)
                one = experts[first].place(alone[first], n)[both]
                other = experts[second].place(alone[second], n)[both]
                codes = torch.repeat_interleave(torch.tensor([0, 1], device=both.device), len(one))
                value = value + mmd(torch.cat([one, other]), codes)
        return value

    def _pairs(self, experts: Mapping[str, Expert], n: int) -> Tensor:
        """Squared distance of each modality's mean to the mean of the cell's modalities (ours)."""
        means = torch.stack([e.place(e.mean, n) for e in experts.values()])
        here = torch.stack([e.place(torch.ones_like(e.mean), n) for e in experts.values()])
        centre = (means * here).sum(0) / here.sum(0).clamp(min=1)
        return ((means - centre).square() * here).sum()

    def _context(self, batch: Minibatch, experts: Mapping[str, Expert]) -> Tensor:
        """Sizes of the encoded modalities (NaN for the others), then the covariates."""
        sizes = torch.full((batch.n, len(self.layout.modalities)), float("nan"), device=batch.batch.device)
        for number, m in enumerate(self.layout.modalities):
            if m in experts:
                x = batch.x[m]
                rows = slice(None) if x.rows is None else x.rows
                sizes[rows, number] = self._size_of(m)(x)
        return sizes if batch.covariates is None else torch.cat([sizes, batch.covariates], 1)


def _totals(x: TileRows) -> Tensor:
    return x.totals.clamp(min=1)


def _both(one: Expert, other: Expert, n: int) -> Tensor:
    """``(n,)`` bool: cells that both experts know."""
    here = torch.ones(n, dtype=torch.bool, device=one.mean.device)
    for expert in (one, other):
        if expert.rows is not None:
            here &= torch.zeros_like(here).index_fill_(0, expert.rows, True)
    return here
