"""scVAEIT: a conditional VAE that learns to fill in what is missing by hiding what is there.

Du, Cai and Roeder, "Robust probabilistic modeling for single-cell multimodal mosaic integration and imputation via
scVAEIT", PNAS 119(49):e2214414119 (2022). One encoder gives two posteriors of a cell: of all that was measured, q_A,
and of the part left visible, q_V, which takes the place of the prior.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from math import log
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from headless.data.minibatch import Minibatch
from headless.data.mosaic import Layout
from headless.errors import MosaicError
from headless.models.alignment import INVERSE_GAMMAS, mmd
from headless.models.base import Module, Posterior
from headless.models.experts import gaussian_kl, reparametrise
from headless.models.likelihoods import Likelihood
from headless.models.scvaeit.config import ScVaeitConfig
from headless.models.scvaeit.masking import Bank, bank_of, draw, take
from headless.models.scvaeit.networks import EncoderBlocks, MaskEmbedding, OutputBlocks, SplitNorm, Trunk, Widths, dense
from headless.models.scvaeit.objective import Goal, Views, goals_of, kl_between
from headless.models.scvaeit.prepare import commonest_visible, learn
from headless.models.scvaeit.scoring import LEAST_PHI, MOST_PHI, Counts, Peaks

#: The head of counts reaches from 0 to all 10 000 (normalised) counts of a cell in one feature.
TOP = log(10_001.0)


class ScVaeit(Module):
    """The network and the objectives of scVAEIT.

    Parameters
    ----------
    config
        Widths, masks, weights and training.
    layout
        Batches, modalities, features, chromosomes and covariates of the mosaic.
    """

    config: ScVaeitConfig

    def __init__(self, config: ScVaeitConfig, layout: Layout) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.parts = {"z": slice(0, config.n_latent)}
        self.biological = "z"
        self.needs_context = config.skip
        self.widths = {m: _widths(m, layout.chunks[m], config) for m in layout.modalities}
        told = len(layout.batches) > 1 and config.batch_covariate != "none"
        self.n_batch = len(layout.batches) if told else 0
        others = sum(1 if c.levels is None else len(c.levels) for c in layout.covariates)
        n_decoder = self.n_batch + others
        n_encoder = n_decoder if config.batch_covariate == "encoder and decoder" else others
        shift, k = config.norm_shift, config.n_latent
        self.masks = MaskEmbedding(self.widths)
        self.encoders = nn.ModuleDict({m: EncoderBlocks(w, n_encoder) for m, w in self.widths.items()})
        joined = sum(w.width * w.groups for w in self.widths.values())
        self.trunk = Trunk([joined, *config.hidden], shift)
        self.mean_head, self.mean_norm = dense(config.hidden[-1], k), SplitNorm(k, shift)
        self.variance_head = dense(config.hidden[-1], k)
        upward = list(reversed(config.hidden))
        self.decoder_trunk = Trunk([k + self.masks.total + n_decoder, *upward], shift)
        self.outputs = nn.ModuleDict({m: OutputBlocks(w, upward[-1]) for m, w in self.widths.items()})
        counts = [m for m in layout.modalities if m != "atac"]
        self.dispersion_bias = nn.ParameterDict({m: nn.Parameter(torch.zeros(layout.n_features(m))) for m in counts})
        self.dispersion = nn.ParameterDict()
        if n_decoder:
            for m in counts:
                n = layout.n_features(m)
                bound = (6 / (n + n_decoder)) ** 0.5
                self.dispersion[m] = nn.Parameter(torch.empty(n_decoder, n).uniform_(-bound, bound))
        self._remember(layout)
        self.epoch = 0

    def _remember(self, layout: Layout) -> None:
        """Buffers of what is learnt outside of the gradient, kept with the weights."""
        k = len(layout.modalities)
        for m in layout.modalities:
            n = layout.n_features(m)
            self.register_buffer(f"share_{m}", torch.full((n,), 1 / n))
            known = [layout.batches.index(b) for b in layout.measured_in[m]] or [0]
            # A batch without the modality taught the decoder nothing of it: it borrows the code of one that has it.
            borrowed = [b if b in known else known[0] for b in range(len(layout.batches))]
            self.register_buffer(f"code_{m}", torch.tensor(borrowed))
        self.register_buffer("typical", torch.ones(k, dtype=torch.bool))
        self.register_buffer("library", torch.full((k,), 1e4))
        self.register_buffer("top", torch.full((k,), TOP))
        self.register_buffer("modality_weights", torch.full((k,), 1 / k))
        self.register_buffer("loss_sums", torch.zeros(k))
        self.register_buffer("loss_steps", torch.zeros((), dtype=torch.int64))
        if self.config.modality_weights:
            given = [self.config.modality_weights.get(m, 1.0) for m in layout.modalities]
            self.get_buffer("modality_weights").copy_(torch.tensor(given))
        if k == 1:
            m = layout.modalities[0]
            self.register_buffer(
                "mask_table", torch.ones(len(layout.batches), layout.n_features(m), dtype=torch.bool)
            )

    # ---- the contract -------------------------------------------------------------------------------------------

    def prepare(self, batches: Iterable[Minibatch]) -> None:
        learnt, present = learn(batches, self.layout)
        self.get_buffer("typical").copy_(commonest_visible(present, self.config.visible_sets))
        for number, m in enumerate(self.layout.modalities):
            if m not in learnt:
                continue
            facts = learnt[m]
            self.get_buffer(f"share_{m}").copy_(facts.share)
            self.get_buffer("library")[number] = facts.library
            if self.config.head_range == "largest value" and m != "atac":
                self.get_buffer("top")[number] = max(facts.largest, 1e-3)
            if len(self.layout.modalities) == 1:
                self.get_buffer("mask_table").copy_(facts.measured)
            if len(self.layout.measured_in[m]) > 1:
                # Borrow from the largest batch that has it.
                code = self.get_buffer(f"code_{m}")
                has = {self.layout.batches.index(b) for b in self.layout.measured_in[m]}
                code[[b for b in range(len(code)) if b not in has]] = int(facts.cells.argmax())
            if self.config.informed_start:
                self._start_at_mean(m, facts.share, facts.open, float(self.get_buffer("top")[number]))

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        config = self.config
        # Validation hides modalities but no single features (sheet, section 4.1).
        p_feat = config.p_feat if self.training else 0.0
        table = self.get_buffer("mask_table") if len(self.layout.modalities) == 1 else None
        tables = None if table is None or bool(table.all()) else {self.layout.modalities[0]: table}
        hidden = draw(batch, self.layout.modalities, p_feat, config.visible_sets, tables)
        banks = {m: bank_of(x, batch.n, self.get_buffer(f"share_{m}"), hidden[m]) for m, x in batch.x.items()}
        return self._objective(batch, banks)

    def encode(self, batch: Minibatch, modalities: Sequence[str] | None = None) -> Posterior:
        """The mean of q given the mask restricted to ``modalities``; the rest counts as missing."""
        banks = batch.cache.get("banks")
        if banks is None:
            banks = {m: bank_of(x, batch.n, self.get_buffer(f"share_{m}")) for m, x in batch.x.items()}
            if not self.training:
                batch.cache["banks"] = banks
        wanted = {m: bank for m, bank in banks.items() if modalities is None or m in modalities}
        views = self._encode(batch, wanted, ("full",))
        library = torch.full((batch.n, len(self.layout.modalities)), float("nan"), device=views.mean.device)
        for number, m in enumerate(self.layout.modalities):
            if m in wanted:
                at = slice(None) if batch.x[m].rows is None else batch.x[m].rows
                library[at, number] = _library(wanted[m])[: wanted[m].m]
        told = self._covariates(batch)
        pieces = [views.embedding, library, *([] if told is None else [told])]
        if self.config.skip:
            pieces += list(views.activations.values())
        context = torch.cat([piece.float() for piece in pieces], 1)
        return Posterior(views.mean, views.log_variance, self.parts, self.biological, context)

    def decode(self, latent: Tensor, modality: str, batch: Tensor, context: Tensor | None = None) -> Likelihood:
        if context is None:
            context = self._typical(latent)
        k, others = len(self.layout.modalities), self._n_others
        widths = [self.masks.total, k, others]
        if self.config.skip:
            widths += [w.width * w.groups for w in self.widths.values()]
        embedding, library, told, *skips = torch.split(context, widths, 1)
        number = self.layout.modalities.index(modality)
        depth = library[:, number]
        depth = torch.where(torch.isnan(depth), self.get_buffer("library")[number], depth)
        codes = self.get_buffer(f"code_{modality}")[batch]
        covariates = self._decoder_covariates(codes, told)
        with self.autocast():
            trunk = self._decoder_trunk(latent, embedding, covariates, 1)
            output = self.outputs[modality](trunk, skips[number] if skips else None)
        return self._likelihood(modality, output, depth, codes, told)

    def _typical(self, latent: Tensor) -> Tensor:
        """The context of cells of which nothing is known: what training showed most often was visible."""
        if self.config.skip:
            raise MosaicError(
                "model.cannot",
                "With the skip on, scVAEIT predicts from the visible data of a cell; its latent state is not enough.",
                "Predict from the cells themselves, or train with the skip off (--set skip=false).",
            )
        n, visible = len(latent), self.get_buffer("typical").tolist()
        sums = [self.masks.weights[m].sum(0) for m, seen in zip(self.widths, visible, strict=True) if not seen]
        embedding = self.masks.finish(reduce(add, sums, torch.zeros_like(self.masks.bias))).expand(n, -1)
        library = self.get_buffer("library").expand(n, -1)
        told = self._covariates(Minibatch(torch.arange(n), torch.zeros(n, dtype=torch.int64, device=latent.device)))
        return torch.cat([embedding, library, *([] if told is None else [told])], 1)

    def start_epoch(self, epoch: int, step: int, total_steps: int) -> None:
        self.epoch = epoch

    def extra_state(self) -> dict[str, Any]:
        weights = self.get_buffer("modality_weights").tolist()
        return {"epoch": self.epoch, "modality_weights": dict(zip(self.layout.modalities, weights, strict=True))}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        # The weights themselves are a buffer; they stand in the state to be read by people.
        self.epoch = int(state.get("epoch", 0))

    # ---- networks -----------------------------------------------------------------------------------------------

    @property
    def _n_others(self) -> int:
        """Columns of covariates besides the batch."""
        return sum(1 if c.levels is None else len(c.levels) for c in self.layout.covariates)

    def _covariates(self, batch: Minibatch) -> Tensor | None:
        """``(n, .)``: categories one-hot, numbers as they are (standardised); typical where nothing is known."""
        columns = []
        for number, c in enumerate(self.layout.covariates):
            known = None if batch.covariates is None else batch.covariates[:, number]
            if c.levels is None:
                columns.append((torch.zeros(batch.n, device=batch.batch.device) if known is None else known)[:, None])
            else:
                codes = torch.full_like(batch.batch, c.typical) if known is None else known.long()
                columns.append(one_hot(codes, len(c.levels)).float())
        return torch.cat(columns, 1) if columns else None

    def _decoder_covariates(self, codes: Tensor, told: Tensor | None) -> Tensor | None:
        columns = [] if told is None or told.shape[1] == 0 else [told]
        if self.n_batch:
            columns.insert(0, one_hot(codes, self.n_batch).float())
        return torch.cat(columns, 1) if columns else None

    def _encode(self, batch: Minibatch, banks: dict[str, Bank], names: tuple[str, ...]) -> Views:
        """Encode several views of the cells in one pass."""
        groups, n = len(names), batch.n
        told = self._covariates(batch)
        with_batch = self.config.batch_covariate == "encoder and decoder"
        covariates = self._decoder_covariates(batch.batch, told) if with_batch else told
        if covariates is not None and groups > 1:
            covariates = covariates.repeat(groups, 1)
        with self.autocast():
            products, sums = {}, []
            for m in self.layout.modalities:
                bank = banks.get(m)
                if bank is None:
                    sums.append(self.masks.weights[m].sum(0, keepdim=True))
                    continue
                product, mask_rows = self._rows(m, bank, batch, "hidden" in names)
                index = torch.cat([bank.views[name] for name in names])
                # -1 is the last row: nothing of this modality.
                index = torch.where(index < 0, len(mask_rows) - 1, index)
                products[m] = product.index_select(0, index)
                sums.append(mask_rows.index_select(0, index))
            embedding = self.masks.finish(reduce(add, sums).expand(groups * n, -1))
            activations, start = {}, 0
            for m, widths in self.widths.items():
                size = widths.mask * widths.groups
                encoder = self.encoders[m]
                if m not in products:
                    products[m] = embedding.new_zeros(groups * n, widths.width * widths.groups)
                activations[m] = encoder(products[m], embedding[:, start : start + size], covariates)
                start += size
            h = self.trunk(torch.cat(list(activations.values()), 1), groups)
            mean = self.mean_norm(self.mean_head(h), groups)
            log_variance = self.variance_head(h)
        return Views(names, n, mean.float(), log_variance.float(), embedding, activations)

    def _rows(self, m: str, bank: Bank, batch: Minibatch, with_hidden: bool) -> tuple[Tensor, Tensor]:
        """First-layer products and mask sums of the rows of a bank that some view shows, and a last row: nothing."""
        used = bank.m + bank.k * (2 if with_hidden else 1)
        x = bank.x
        if used < x.n_rows:
            end = int(x.indptr[used])
            row_ids = x.row_ids[:end]
            x = type(x)(None, x.indptr[: used + 1], x.columns[:end], x.values[:end], x.n_columns, None)
            x.__dict__["row_ids"] = row_ids
        if m == "atac":
            values = (x.values > 0.5).float()
        else:
            rate = 1e4 / _library(bank).clamp(min=1e-8)
            values = torch.log1p(x.values * rate[x.row_ids])
        encoder = self.encoders[m]
        assert isinstance(encoder, EncoderBlocks)
        product = encoder.product(x.with_values(values))
        product = torch.cat([product, product.new_zeros(1, product.shape[1])])
        parts = torch.cat([bank.visible, bank.hidden]) if with_hidden else bank.visible
        rows = batch.x[m].rows
        codes = batch.batch if rows is None else batch.batch[rows]
        return product, self.masks.rows(m, bank.m, bank.mask, codes, parts)

    def _decoder_trunk(self, z: Tensor, embedding: Tensor, covariates: Tensor | None, groups: int) -> Tensor:
        inputs = [z, embedding] if covariates is None else [z, embedding, covariates]
        out: Tensor = self.decoder_trunk(torch.cat(inputs, 1), groups)
        return out

    def _likelihood(
        self, m: str, output: Tensor, library: Tensor, codes: Tensor, told: Tensor | None
    ) -> Counts | Peaks:
        """The likelihood of rows with these batch codes and other covariates ``told``."""
        if m == "atac":
            return Peaks(output)
        level, group = self.dispersion_bias[m][None], None
        if self._n_others:
            # Few cells differ in their covariates, unless one is continuous.
            columns = self._decoder_covariates(codes, told)
            assert columns is not None
            kinds, group = torch.unique(columns, dim=0, return_inverse=True)
            level = torch.addmm(self.dispersion_bias[m], kinds, self.dispersion[m])
        elif self.n_batch:
            level, group = self.dispersion_bias[m] + self.dispersion[m], codes
        phi = softplus(level.float()).clamp(LEAST_PHI, MOST_PHI)
        top = float(self.get_buffer("top")[self.layout.modalities.index(m)])
        return Counts(output, phi, library, top, self.config.nb_target == "lognorm", group)

    # ---- the objective ------------------------------------------------------------------------------------------

    def _objective(self, batch: Minibatch, banks: dict[str, Bank]) -> dict[str, Tensor]:
        config, n = self.config, batch.n
        something = torch.stack([bank.views["hidden"] >= 0 for bank in banks.values()]).any(0)
        names, goals = goals_of(config, bool(something.any()))
        views = self._encode(batch, banks, names)
        z = reparametrise(views.mean, views.log_variance).clamp(-1e6, 1e6)
        terms = self._reconstruction(batch, banks, views, z, goals)

        def kl(a: str, b: str) -> Tensor:
            a_, b_ = views.of(a), views.of(b)
            each = kl_between(views.mean[a_], views.log_variance[a_], views.mean[b_], views.log_variance[b_])
            # Batch statistics differ between views, so a cell with nothing hidden would count; it must not.
            return (each * something).sum() / n

        if len(names) > 1 and config.objective == "description":
            terms["kl"] = config.beta * config.weight_kl * kl("full", "visible")
        elif len(names) > 1:
            forward = kl("visible", "full")
            if "hidden" in names:
                forward = (1 - config.beta_reverse) * forward + config.beta_reverse * kl("hidden", "full")
            terms["kl"] = config.weight_kl * forward
        first = views.of("full" if "full" in names else "visible")
        if config.weight_prior > 0:
            own = views.of("visible" if "visible" in names else "full")
            terms["prior"] = config.weight_prior * gaussian_kl(views.mean[own], views.log_variance[own]) / n
        if config.mmd_weight > 0:
            terms["mmd"] = config.mmd_weight * config.mmd_decay ** (self.epoch / 50) * self._mixing(
                batch, views.mean[first]
            )
        return terms

    def _mixing(self, batch: Minibatch, mean: Tensor) -> Tensor:
        """MMD between batches, and between the levels of each categorical covariate (sheet, section 4.3)."""
        total = mmd(mean, batch.batch, INVERSE_GAMMAS)
        for number, covariate in enumerate(self.layout.covariates):
            if covariate.levels is not None and batch.covariates is not None:
                total = total + mmd(mean, batch.covariates[:, number].long(), INVERSE_GAMMAS)
        return total

    def _reconstruction(
        self, batch: Minibatch, banks: dict[str, Bank], views: Views, z: Tensor, goals: list[Goal]
    ) -> dict[str, Tensor]:
        """Named losses of all goals; each modality's scored rows are decoded in one product."""
        n, device = batch.n, z.device
        pairs = list(dict.fromkeys((goal.sample, goal.given) for goal in goals))
        told = self._covariates(batch)
        covariates = self._decoder_covariates(batch.batch, told)
        many = None if covariates is None else covariates.repeat(len(pairs), 1)
        terms: dict[str, Tensor] = {}
        with self.autocast():
            latent = torch.cat([z[views.of(sample)] for sample, _ in pairs])
            embedding = torch.cat([views.embedding[views.of(given)] for _, given in pairs])
            trunk = self._decoder_trunk(latent, embedding, many, len(pairs))
        weights = self.get_buffer("modality_weights").clone()
        for number, m in enumerate(self.layout.modalities):
            if m not in banks:
                continue
            bank = banks[m]
            found = [_scored(bank, goal.scored) for goal in goals]
            counts = [len(cells) for cells, _ in found]
            if not sum(counts):
                continue
            cells, rows = (torch.cat(part) for part in zip(*found, strict=True))
            sizes = torch.tensor(counts, device=device)
            goal_of = torch.repeat_interleave(torch.arange(len(goals), device=device), sizes, output_size=sum(counts))
            at = [pairs.index((goal.sample, goal.given)) for goal in goals]
            seen = [views.names.index(goal.given) for goal in goals]
            order = bank.order(rows)
            cells, rows, goal_of = cells[order], rows[order], goal_of[order]
            in_trunk = torch.tensor(at, device=device)[goal_of] * n + cells
            in_views = torch.tensor(seen, device=device)[goal_of] * n + cells
            with self.autocast():
                skip = views.activations[m].index_select(0, in_views) if self.config.skip else None
                output = self.outputs[m](trunk.index_select(0, in_trunk), skip)
            library = torch.ones(n, device=device)
            at_cells = slice(None) if batch.x[m].rows is None else batch.x[m].rows
            library[at_cells] = _library(bank)[: bank.m]
            others = None if told is None else told[cells]
            likelihood = self._likelihood(m, output, library[cells], batch.batch[cells], others)
            target = take(bank.x, rows)
            each = likelihood.rows(target, bank.masks(rows)) + likelihood.constants(target)
            sums = torch.zeros(len(goals), device=device).index_add(0, goal_of, each)
            if self.training:
                self._weigh(number, sums.detach().sum() / n)
            for position, goal in enumerate(goals):
                name = f"{goal.term}_{m}"
                term = goal.weight * weights[number] * sums[position] / n
                terms[name] = terms[name] + term if name in terms else term
        if self.training:
            self._freeze_weights()
        return terms

    def _weigh(self, number: int, loss: Tensor) -> None:
        """Take note of a modality's loss while automatic weights are not yet set."""
        if not self.config.modality_weights and int(self.get_buffer("loss_steps")) < self.config.weights_after:
            self.get_buffer("loss_sums")[number] += loss

    @torch.no_grad()
    def _freeze_weights(self) -> None:
        """After some steps the weight of a modality is one over its mean loss, all summing to one (sheet, 4.3)."""
        steps = self.get_buffer("loss_steps")
        if self.config.modality_weights or int(steps) >= self.config.weights_after:
            return
        steps += 1
        if int(steps) == self.config.weights_after:
            sums = self.get_buffer("loss_sums")
            inverse = torch.where(sums > 0, 1 / sums.clamp(min=1e-8), torch.zeros_like(sums))
            if bool((inverse > 0).any()):
                self.get_buffer("modality_weights").copy_(inverse / inverse.sum())

    @torch.no_grad()
    def _start_at_mean(self, m: str, share: Tensor, is_open: Tensor, top: float) -> None:
        """Set the output bias to the feature means of the training cells."""
        if m == "atac":
            wanted = is_open.clamp(1e-4, 1 - 1e-4)
        else:
            wanted = (torch.log1p(1e4 * share) / top).clamp(1e-4, 1 - 1e-4)
        outputs = self.outputs[m]
        assert isinstance(outputs, OutputBlocks)
        outputs.last_bias.copy_(torch.logit(wanted))


def _widths(modality: str, sizes: tuple[int, ...], config: ScVaeitConfig) -> Widths:
    if modality == "adt":
        return Widths(sizes, config.adt_width, config.adt_mask)
    if len(sizes) > 1:
        return Widths(sizes, config.chunk_width, config.chunk_mask)
    return Widths(sizes, config.rna_width, config.rna_mask)


def _library(bank: Bank) -> Tensor:
    """``(rows,)``: counts of each row as if all features were there.

    The sum over the row's own features alone, divided by their share of a typical cell: what is hidden has no say.
    """
    return bank.x.totals / bank.share.clamp(min=1e-6)


def _scored(bank: Bank, view: str) -> tuple[Tensor, Tensor]:
    """Cells that a view shows something of, and their rows of the bank."""
    index = bank.views[view]
    cells = torch.nonzero(index >= 0).flatten()
    return cells, index[cells]
