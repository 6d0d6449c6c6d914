"""scMM: a mixture of experts, one a modality, each of which must reconstruct every modality.

Minoura et al., "A mixture-of-experts deep generative model for integrated analysis of single-cell multiomics data",
Cell Reports Methods 1:100071 (2021). Beyond the paper (our extensions): three and more modalities, cells that lack a
modality, batches, an alignment of the experts; all are without effect for two complete modalities of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from headless.data.minibatch import Minibatch, TileRows
from headless.data.mosaic import Layout
from headless.models.base import Module, OptimizerSpec, Posterior
from headless.models.count_likelihoods import NegativeBinomial, ZeroInflatedNB
from headless.models.likelihoods import Likelihood
from headless.models.scmm.config import ScmmConfig
from headless.models.scmm.networks import SCALE, BatchCode, Decoder, Encoder, take_rows


def laplace_kl(location: Tensor, scale: Tensor, prior: Tensor) -> Tensor:
    """KL divergence of Laplace(location, scale) from Laplace(0, prior), element by element (sheet, section 4)."""
    away = location.abs()
    return torch.log(prior / scale) + away / prior + scale / prior * torch.exp(-away / scale) - 1.0


def gaussian_kl(location: Tensor, scale: Tensor, prior: Tensor) -> Tensor:
    """KL divergence of N(location, scale^2) from N(0, prior^2), element by element."""
    share = (scale / prior).square()
    return 0.5 * (share + (location / prior).square() - 1.0 - torch.log(share))


@dataclass
class Expert:
    """What one modality says of the cells that have it.

    Attributes
    ----------
    x
        The counts of these cells; cells without a single count are left out.
    cells
        ``(m,)`` their positions in the minibatch.
    library
        ``(m,)`` their library sizes, scaled up where features were not measured.
    location, scale
        ``(m, dim)``: of the posterior; ``scale`` is b (Laplace) or the standard deviation.
    """

    x: TileRows
    cells: Tensor
    library: Tensor
    location: Tensor
    scale: Tensor


@dataclass
class _Group:
    """Cells of a minibatch that have the same modalities (A_n)."""

    cells: Tensor
    modalities: tuple[str, ...]


class Scmm(Module):
    """The network and the objective of scMM.

    The terms of :meth:`loss` are those of the sheet divided by the number of cells, as the loop reports them. The
    published loss is the sum; Adam's steps are the same for both when its ``eps`` is divided too, and it is.

    Parameters
    ----------
    config
        Widths, distributions and training.
    layout
        Batches, modalities and features of the mosaic.
    """

    config: ScmmConfig

    def __init__(self, config: ScmmConfig, layout: Layout) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.parts = {"z": slice(0, config.dim)}
        self.biological = "z"
        self.beta = 1.0 if config.kl_warmup == 0 else 0.0
        self.encoders = nn.ModuleDict()
        self.decoders = nn.ModuleDict()
        several = len(layout.batches) > 1
        for m in layout.modalities:
            n, width = layout.n_features(m), config.hidden_rna if m == "rna" else config.hidden_other
            measured = [b in layout.measured_in[m] for b in layout.batches]
            code = BatchCode(measured, n, width) if several and config.batch_in == "both" else None
            self.encoders[m] = Encoder(n, width, config.layers, config.dim, code)
            code = BatchCode(measured, config.dim, width) if several and config.batch_in != "none" else None
            self.decoders[m] = Decoder(n, width, config.layers, config.dim, code, inflated=m == "atac")
        self.prior_raw = nn.Parameter(torch.zeros(config.dim), requires_grad=config.learn_prior)
        n_modalities, n_batches = len(layout.modalities), len(layout.batches)
        self.register_buffer("median_library", torch.full((n_modalities,), SCALE))
        self.register_buffer("mean_library", torch.full((n_modalities,), SCALE))
        # Share of a modality's usual counts that fall on the features which a batch measured.
        self.register_buffer("measured_share", torch.ones(n_modalities, n_batches))

    # ---- the contract -------------------------------------------------------------------------------------------

    def optimizers(self) -> dict[str, OptimizerSpec]:
        config = self.config
        eps = 1e-8 / config.batch_size  # the terms are divided by the number of cells, so eps is too
        return {"model": OptimizerSpec(list(self.parameters()), config.lr, config.weight_decay, eps=eps, amsgrad=True)}

    def start_epoch(self, epoch: int, step: int, total_steps: int) -> None:
        """The weight of the KL term: 0 in the first epoch, 1 after ``kl_warmup`` epochs."""
        warmup = self.config.kl_warmup
        self.beta = min(1.0, epoch / warmup) if warmup else 1.0

    def extra_state(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.beta = float(state.get("beta", 1.0))

    def prepare(self, batches: Iterable[Minibatch]) -> None:
        """Median and mean library sizes, the share of each batch's features, and, if wanted, the decoders' start."""
        modalities, n_batches = self.layout.modalities, len(self.layout.batches)
        counts = {m: torch.zeros(n_batches, self.layout.n_features(m), dtype=torch.float64) for m in modalities}
        measured = {m: torch.zeros_like(counts[m]) for m in modalities}
        sizes: dict[str, list[Tensor]] = {m: [] for m in modalities}
        codes: dict[str, list[Tensor]] = {m: [] for m in modalities}
        for batch in batches:
            for m, x in self._present(batch).items():
                code = batch.batch[_cells(x, batch)].cpu()
                entry = (code[x.row_ids.cpu()], x.columns.long().cpu())
                counts[m].index_put_(entry, x.values.double().cpu(), accumulate=True)
                mask = torch.ones(x.n_rows, 1) if x.mask is None else x.mask.expand(x.n_rows, -1).cpu()
                for number in torch.unique(code).tolist():
                    measured[m][number] = mask[int((code == number).int().argmax())].double()
                sizes[m].append(x.totals.double().cpu())
                codes[m].append(code)
        for number, m in enumerate(modalities):
            if sizes[m]:
                self._learn(number, m, counts[m], measured[m], torch.cat(sizes[m]), torch.cat(codes[m]))

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        """``recon_<source>_to_<target>``, ``kl_<source>`` and, if wanted, ``alignment``; each per cell.

        In evaluation mode the KL term has its full weight, so that epochs can be compared.
        """
        experts = self._experts(batch)
        groups = self._groups(experts, batch.n)
        drawn = {m: self._draw(expert) for m, expert in experts.items()}
        terms: dict[str, Tensor] = {}
        for target in experts:
            self._reconstruct(target, experts, groups, drawn, batch, terms)
        weight = torch.zeros(batch.n, device=batch.batch.device)
        for group in groups:
            weight[group.cells] = 1.0 / len(group.modalities)
        beta = self.beta if self.training else 1.0
        for m, expert in experts.items():
            divergence = self._divergence(expert).sum(1) * weight[expert.cells]
            terms[f"kl_{m}"] = beta * divergence.sum() / batch.n
        if self.config.alignment > 0 and len(experts) > 1:
            terms["alignment"] = self.config.alignment * self._spread(experts, groups, batch.n) / batch.n
        return terms

    def encode(self, batch: Minibatch, modalities: Sequence[str] | None = None) -> Posterior:
        """Mean of the experts' locations, exact and not a draw from the mixture (sheet, section 6).

        ``log_variance`` is the logarithm of the mean of the experts' own variances (``2 b^2`` for a Laplace
        distribution); how far their locations lie apart is not in it. Cells without any of the modalities get the
        prior. The context is ``(n, M)``: library sizes of the encoded modalities, NaN for all others.
        """
        experts = self._experts(batch)
        wanted = [m for m in experts if modalities is None or m in modalities]
        dim, device = self.config.dim, batch.batch.device
        context = torch.full((batch.n, len(self.layout.modalities)), math.nan, device=device)
        location, variance = torch.zeros(batch.n, dim, device=device), torch.zeros(batch.n, dim, device=device)
        number = torch.zeros(batch.n, 1, device=device)
        factor = 2.0 if self.config.posterior == "laplace" else 1.0
        for m in wanted:
            expert = experts[m]
            location = location.index_add(0, expert.cells, expert.location)
            variance = variance.index_add(0, expert.cells, factor * expert.scale.square())
            number[expert.cells] += 1
            context[expert.cells, self.layout.modalities.index(m)] = expert.library
        prior = (factor * self._prior().square()).expand_as(variance)
        variance = torch.where(number > 0, variance / number.clamp(min=1), prior)
        return Posterior(location / number.clamp(min=1), variance.log(), self.parts, self.biological, context)

    def decode(self, latent: Tensor, modality: str, batch: Tensor, context: Tensor | None = None) -> Likelihood:
        """Counts at the library sizes that the setting ``library`` chooses; the median without context."""
        with self.autocast():
            found = self.decoders[modality](latent, batch)
        return self._likelihood(modality, found, self._library(modality, len(latent), context))

    def standard_mean(self, latent: Tensor, modality: str, batch: Tensor) -> Tensor:
        """Expected counts ``(n, D)`` at a library of 10,000, whatever the setting ``library``."""
        with self.autocast():
            found = self.decoders[modality](latent, batch)
        return self._likelihood(modality, found, latent.new_full((len(latent),), SCALE)).mean

    def prior_sd(self, kind: Literal["faithful", "corrected"] = "corrected") -> Tensor:
        """``(dim,)``: the prior's standard deviation, or ``sqrt(exp phi)`` as the public code has it (sheet, 6)."""
        raw = self.prior_raw.detach()
        if kind == "faithful" or self.config.posterior == "gaussian":
            return torch.exp(0.5 * raw)
        return math.sqrt(2.0) * self._prior().detach()

    # ---- the parts ----------------------------------------------------------------------------------------------

    def _prior(self) -> Tensor:
        """Scale of the prior, ``(dim,)``: b, or the standard deviation."""
        if self.config.posterior == "laplace":
            return torch.softmax(self.prior_raw, 0) * self.config.dim
        return torch.exp(0.5 * self.prior_raw)

    def _divergence(self, expert: Expert) -> Tensor:
        kl = laplace_kl if self.config.posterior == "laplace" else gaussian_kl
        return kl(expert.location, expert.scale, self._prior())

    def _draw(self, expert: Expert) -> Tensor:
        if self.config.posterior == "gaussian":
            return expert.location + expert.scale * torch.randn_like(expert.scale)
        # Inverse distribution function; 1e-7 keeps the logarithm of a draw at the border finite.
        u = torch.rand_like(expert.scale) - 0.5
        return expert.location - expert.scale * u.sign() * torch.log1p((-2.0 * u.abs()).clamp(min=-1 + 1e-7))

    def _present(self, batch: Minibatch) -> dict[str, TileRows]:
        """Rows of the cells that have a modality; a cell without a single count in it lacks it."""
        found = {}
        for m, x in batch.x.items():
            some = x.totals > 0
            kept = x if bool(some.all()) else take_rows(x, torch.nonzero(some).flatten())
            if kept.n_rows:
                found[m] = kept
        return found

    def _experts(self, batch: Minibatch) -> dict[str, Expert]:
        if not self.training and "experts" in batch.cache:
            cached: dict[str, Expert] = batch.cache["experts"]
            return cached
        experts: dict[str, Expert] = {}
        for m, x in self._present(batch).items():
            cells = _cells(x, batch)
            code = batch.batch[cells]
            library = x.totals / self.get_buffer("measured_share")[self.layout.modalities.index(m)][code]
            values = x.values * (SCALE / library)[x.row_ids]
            if self.config.log_input:
                values = torch.log1p(values)
            if m != "adt":
                values = dropout(values, self.config.input_dropout, self.training)
            with self.autocast():
                location, raw = self.encoders[m](x.with_values(values), code)
            experts[m] = Expert(x, cells, library, location.float(), self._scale(raw.float()))
        if not self.training:
            batch.cache["experts"] = experts
        return experts

    def _scale(self, raw: Tensor) -> Tensor:
        if self.config.posterior == "laplace":
            return torch.softmax(raw, dim=1) * self.config.dim + 1e-6
        return torch.exp(0.5 * raw)

    def _groups(self, experts: Mapping[str, Expert], n: int) -> list[_Group]:
        """Cells by their set of modalities."""
        names = list(experts)
        pattern = torch.zeros(n, dtype=torch.int64, device=self.prior_raw.device)
        for number, m in enumerate(names):
            pattern[experts[m].cells] += 2**number
        return [
            _Group(torch.nonzero(pattern == code).flatten(), tuple(m for i, m in enumerate(names) if code >> i & 1))
            for code in torch.unique(pattern).tolist()
            if code
        ]

    def _reconstruct(
        self,
        target: str,
        experts: Mapping[str, Expert],
        groups: Sequence[_Group],
        drawn: Mapping[str, Tensor],
        batch: Minibatch,
        terms: dict[str, Tensor],
    ) -> None:
        """Negative log-likelihood of one modality from every expert, in one pass of its decoder.

        BatchNorm sees the cells of each expert apart, as in one pass an expert.
        """
        sources, factor = list(experts), self.config.rna_weight if target == "rna" else 1.0
        if self.config.cross == "sampled" and self.training and len(sources) > 1:
            # One expert, drawn, counts as many times as there are experts: the same on average.
            factor *= len(sources)
            sources = [sources[int(torch.randint(len(sources), ()))]]
        here = [group for group in groups if target in group.modalities]
        place = {m: _places(experts[m].cells, batch.n) for m in (*sources, target)}
        pieces: list[tuple[str, int]] = []
        states, codes, sizes = [], [], []
        for source in sources:
            rows = 0
            for number, group in enumerate(here):
                if source in group.modalities:
                    pieces.append((source, number))
                    states.append(drawn[source][place[source][group.cells]])
                    codes.append(batch.batch[group.cells])
                    rows += len(group.cells)
            if rows:
                sizes.append(rows)
        if not pieces:
            return
        expert = experts[target]
        with self.autocast():
            found = self.decoders[target](torch.cat(states), torch.cat(codes), sizes)
        lengths = [len(state) for state in states]
        split = list(zip(*(torch.split(values, lengths) for values in found), strict=True))
        own = [place[target][group.cells] for group in here]
        x = [expert.x if len(rows) == expert.x.n_rows else take_rows(expert.x, rows) for rows in own]
        for (source, number), parameters in zip(pieces, split, strict=True):
            likelihood = self._likelihood(target, parameters, expert.library[own[number]])
            share = factor / len(here[number].modalities) / batch.n
            name = f"recon_{source}_to_{target}"
            value = share * likelihood.nll(x[number])
            terms[name] = terms[name] + value if name in terms else value

    @staticmethod
    def _likelihood(modality: str, parameters: tuple[Tensor, ...], library: Tensor) -> Likelihood:
        """The library multiplies the shape: ``R = r library / 10,000``."""
        log_r, logit, *gate = parameters
        total = torch.exp(log_r.float() + torch.log(library / SCALE)[:, None])
        return ZeroInflatedNB(total, logit, gate[0]) if gate else NegativeBinomial(total, logit)

    def _library(self, modality: str, n: int, context: Tensor | None) -> Tensor:
        """``(n,)`` library sizes for decoding."""
        number = self.layout.modalities.index(modality)
        median = self.get_buffer("median_library")[number]
        kind = self.config.library
        if kind == "number":
            return torch.full_like(median, self.config.library_size).expand(n)
        if kind == "median" or context is None:
            return median.expand(n)
        own = context[:, number]
        elsewhere = median.expand(n)
        if kind == "ratio":
            mean = self.get_buffer("mean_library")
            guessed = torch.nanmean(context / mean, dim=1) * mean[number]
            elsewhere = torch.where(torch.isnan(guessed), elsewhere, guessed)
        return torch.where(torch.isnan(own), elsewhere, own)

    def _spread(self, experts: Mapping[str, Expert], groups: Sequence[_Group], n: int) -> Tensor:
        """Sum over cells of the mean squared distance of the experts' locations from their mean."""
        total = self.prior_raw.new_zeros(())
        place = {m: _places(expert.cells, n) for m, expert in experts.items()}
        for group in groups:
            if len(group.modalities) > 1:
                at = torch.stack([experts[m].location[place[m][group.cells]] for m in group.modalities])
                total = total + (at - at.mean(0)).square().mean(0).sum()
        return total

    @torch.no_grad()
    def _learn(self, number: int, m: str, counts: Tensor, measured: Tensor, sizes: Tensor, codes: Tensor) -> None:
        """Library sizes and feature means of a modality.

        Where batches measured different features, a library is divided by the share of the usual counts that its
        features stand for; shares and usual counts are found in turn.
        """
        within = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, codes, sizes)
        share = torch.ones(len(counts), dtype=torch.float64)
        profile = counts.sum(0)
        for _ in range(20 if bool((measured[within > 0] == 0).any()) else 1):
            reach = (measured * (within / share)[:, None]).sum(0)
            profile = torch.where(reach > 0, counts.sum(0) / reach.clamp(min=1e-12), 0.0)
            profile = profile / profile.sum()
            seen = (measured * profile).sum(1)
            share = torch.where(seen > 0, seen, 1.0)
        library = sizes / share[codes]
        self.get_buffer("measured_share")[number] = share.float()
        self.get_buffer("median_library")[number] = library.median().float()
        self.get_buffer("mean_library")[number] = library.mean().float()
        if self.config.data_bias:
            decoder = self.decoders[m]
            assert isinstance(decoder, Decoder)
            # At the start p = 1/2 and the gate lets half of the counts through, so the mean is r or r / 2.
            start = profile * SCALE * (1.0 if decoder.gate is None else 2.0)
            decoder.log_r.bias.copy_(torch.log(start.clamp(min=1e-3)).float())
            decoder.logit.bias.zero_()


def _cells(x: TileRows, batch: Minibatch) -> Tensor:
    """Positions in the minibatch of the rows of a tile."""
    return torch.arange(batch.n, device=batch.batch.device) if x.rows is None else x.rows


def _places(cells: Tensor, n: int) -> Tensor:
    """``(n,)``: the row of each cell of the minibatch in a tile with these cells."""
    places = torch.zeros(n, dtype=torch.int64, device=cells.device)
    places[cells] = torch.arange(len(cells), device=cells.device)
    return places
