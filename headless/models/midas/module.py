"""MIDAS: mosaic integration by a product of experts, technical and biological states kept apart by an adversary.

He et al., "Mosaic integration and knowledge transfer of single-cell multimodal data with MIDAS", Nature Biotechnology
(2024). Latent z = [c, u]: c biological, u technical.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headless.data.minibatch import Minibatch, TileRows
from headless.data.mosaic import Layout
from headless.models.base import Module, OptimizerSpec, Posterior, Update
from headless.models.experts import gaussian_kl, keep_some, precision, product_of_experts, reparametrise
from headless.models.likelihoods import Bernoulli, Likelihood, Poisson
from headless.models.midas.config import MidasConfig
from headless.models.midas.networks import DataDecoder, DataEncoder, Discriminators, stack


@dataclass
class Expert:
    """What one source says of z: ``T mu`` and ``T``, ``(n, d)``; zeros where ``present`` says that a cell lacks it."""

    weighted: Tensor
    precision: Tensor
    present: Tensor | None


class Midas(Module):
    """The network and the objective of MIDAS.

    Parameters
    ----------
    config
        Widths, weights and training.
    layout
        Batches, modalities, features and chromosomes of the mosaic.
    """

    config: MidasConfig

    def __init__(self, config: MidasConfig, layout: Layout) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        dim_z = config.dim_c + config.dim_u
        self.parts = {"c": slice(0, config.dim_c), "u": slice(config.dim_c, dim_z)}
        self.biological = "c"
        n_batches, p = len(layout.batches), config.dropout
        chunks = {m: layout.chunks[m] for m in layout.modalities}
        self.encoders = nn.ModuleDict({m: DataEncoder(chunks[m], config) for m in chunks})
        self.trunk = stack([config.data_hidden, *config.trunk_hidden, 2 * dim_z], p)
        self.batch_encoder = stack([n_batches, 16, 16, 2 * dim_z], p)
        self.decoder = DataDecoder(chunks, dim_z, config)
        self.batch_decoder = stack([config.dim_u, 16, 16, n_batches], p)
        heads = [len(layout.measured_in[m]) for m in chunks] + [n_batches]
        self.discriminators = Discriminators(config.dim_c, heads, p)
        # Class of each batch for each modality's discriminator: its place among the batches that have the modality.
        for m in chunks:
            index = [layout.measured_in[m].index(b) if b in layout.measured_in[m] else 0 for b in layout.batches]
            self.register_buffer(f"_class_{m}", torch.tensor(index), persistent=False)

    # ---- the contract -------------------------------------------------------------------------------------------

    def optimizers(self) -> dict[str, OptimizerSpec]:
        rate, decay = self.config.lr, self.config.weight_decay
        owned = {id(p) for p in self.discriminators.parameters()}
        network = [p for p in self.parameters() if id(p) not in owned]
        return {
            "model": OptimizerSpec(network, rate, decay),
            "discriminator": OptimizerSpec(list(self.discriminators.parameters()), rate, decay),
        }

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        terms, c = self._objective(batch)
        terms["adversarial"] = -self._discriminate(batch, c)
        return terms

    def training_step(self, batch: Minibatch) -> Iterator[Update]:
        """One forward pass; discriminator updates on its detached c; one update of the network (sheet, section 4)."""
        terms, c = self._objective(batch)
        if self.config.weight_adversarial > 0:
            detached = {name: value.detach() for name, value in c.items()}
            for _ in range(self.config.discriminator_steps):
                yield Update("discriminator", {"discriminator": self._discriminate(batch, detached)})
            # The adversarial term moves c alone: gradients of the discriminators' own weights are not needed.
            self.discriminators.requires_grad_(False)
            terms["adversarial"] = -self._discriminate(batch, c)
            self.discriminators.requires_grad_(True)
        yield Update("model", terms)

    def encode(self, batch: Minibatch, modalities: Sequence[str] | None = None) -> Posterior:
        experts = self._experts(batch)
        wanted = list(experts) if modalities is None else [m for m in modalities if m in experts]
        mean, log_variance = self._product([experts[m] for m in wanted] + [self._batch_expert(batch)])
        return Posterior(mean, log_variance, self.parts, self.biological)

    def decode(self, latent: Tensor, modality: str, batch: Tensor, context: Tensor | None = None) -> Likelihood:
        with self.autocast():
            return self._likelihood(modality, self.decoder.head(self.decoder.trunk(latent), modality))

    def corrected(self, latent: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Standard noise (sheet, section 6.3): every cell gets the mean u of the batch nearest to the mean of all."""
        u = latent[:, self.parts["u"]]
        present = torch.unique(batch)
        means = torch.stack([u[batch == code].mean(0) for code in present])
        nearest = int((means - u.mean(0)).square().sum(1).argmin())
        out = latent.clone()
        out[:, self.parts["u"]] = means[nearest]
        return out, torch.full_like(batch, int(present[nearest]))

    def monitor(self, terms: Mapping[str, float]) -> float:
        """The negative evidence bound: the game against the discriminators has no value that should fall."""
        return sum(value for key, value in terms.items() if key.startswith(("reconstruction", "kl")))

    # ---- the parts ----------------------------------------------------------------------------------------------

    @staticmethod
    def _likelihood(modality: str, parameters: Tensor) -> Likelihood:
        return Bernoulli(parameters) if modality == "atac" else Poisson(parameters)

    @staticmethod
    def _input(modality: str, x: TileRows) -> TileRows:
        """log(1 + x) for counts, open or closed for peaks; zeros stay zeros, so the input stays sparse."""
        return x.with_values((x.values > 0.5).float() if modality == "atac" else torch.log1p(x.values))

    def _experts(self, batch: Minibatch) -> dict[str, Expert]:
        """Each modality's expert; the shared trunk sees the cells of all modalities in one product."""
        if not self.training and "experts" in batch.cache:
            cached: dict[str, Expert] = batch.cache["experts"]
            return cached
        present = {m: x for m, x in batch.x.items() if x.n_rows}
        with self.autocast():
            hidden = [self.encoders[m](self._input(m, x)) for m, x in present.items()]
            out = self.trunk(torch.cat(hidden) if len(hidden) > 1 else hidden[0]) if hidden else None
        experts: dict[str, Expert] = {}
        start = 0
        for m, x in present.items():
            assert out is not None
            mean, log_variance = out[start : start + x.n_rows].float().chunk(2, dim=1)
            start += x.n_rows
            t = precision(log_variance)
            weighted, here = t * mean, None
            if x.rows is not None:
                zeros = weighted.new_zeros(batch.n, weighted.shape[1])
                weighted, t = zeros.index_copy(0, x.rows, weighted), zeros.index_copy(0, x.rows, t)
                here = torch.zeros(batch.n, device=zeros.device).index_fill_(0, x.rows, 1.0)
            experts[m] = Expert(weighted, t, here)
        if not self.training:
            batch.cache["experts"] = experts
        return experts

    def _batch_expert(self, batch: Minibatch) -> Expert:
        first = self.batch_encoder[0]
        with self.autocast():
            # One-hot times weight is a row of the weight.
            hidden = first.get_parameter("weight").t()[batch.batch] + first.get_parameter("bias")
            out = self.batch_encoder[1:](hidden).float()
        mean, log_variance = out.chunk(2, dim=1)
        t = precision(log_variance)
        return Expert(t * mean, t, None)

    def _kept(self, experts: dict[str, Expert]) -> list[Expert]:
        """The experts that the joint posterior hears in this step; all of them unless ``modality_dropout`` is on."""
        every = list(experts.values())
        if not self.training or self.config.modality_dropout == 0 or len(every) < 2:
            return every
        one = every[0].precision.new_ones(len(every[0].precision))
        here = torch.stack([one if e.present is None else e.present for e in every], 1)
        kept = keep_some(here > 0, self.config.modality_dropout)
        return [
            Expert(e.weighted * kept[:, i, None], e.precision * kept[:, i, None], kept[:, i])
            for i, e in enumerate(every)
        ]

    @staticmethod
    def _product(experts: list[Expert]) -> tuple[Tensor, Tensor]:
        return product_of_experts([e.weighted for e in experts], [e.precision for e in experts])

    def _objective(self, batch: Minibatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms 1 to 6 of the sheet, and c of the joint and of each unimodal posterior (the adversary's input)."""
        config, n = self.config, batch.n
        experts = self._experts(batch)
        drop = self.training and float(torch.rand(())) < config.batch_expert_dropout
        from_batch = [] if drop else [self._batch_expert(batch)]
        mean, log_variance = self._product([*self._kept(experts), *from_batch])
        z = reparametrise(mean, log_variance)
        latents = {m: reparametrise(*self._product([expert, *from_batch])) for m, expert in experts.items()}

        terms: dict[str, Tensor] = {}
        with self.autocast():
            hidden = self.decoder.trunk(z)
            outputs = {
                m: self.decoder.head(hidden if x.rows is None else hidden[x.rows], m)
                for m, x in batch.x.items()
                if x.n_rows
            }
            told = None if drop else self.batch_decoder(z[:, self.parts["u"]])
        for m, parameters in outputs.items():
            terms[f"reconstruction_{m}"] = self._likelihood(m, parameters).nll(batch.x[m]) / n
        if told is not None:
            terms["batch"] = config.weight_batch * cross_entropy(told.float(), batch.batch)
        c, u = self.parts["c"], self.parts["u"]
        terms["kl_c"] = config.weight_kl_c * gaussian_kl(mean[:, c], log_variance[:, c]) / n
        terms["kl_u"] = config.weight_kl_u * gaussian_kl(mean[:, u], log_variance[:, u]) / n
        if len(latents) > 1:
            terms["alignment"] = config.weight_alignment * self._spread(latents, experts) / n
        return terms, {"joint": z[:, c], **{m: value[:, c] for m, value in latents.items()}}

    @staticmethod
    def _spread(latents: dict[str, Tensor], experts: dict[str, Expert]) -> Tensor:
        """Sum over cells and modalities of ||z^m - the cell's mean z^m||^2 (term 6); 0 for cells with one modality."""
        z = torch.stack(list(latents.values()))
        if all(expert.present is None for expert in experts.values()):
            return (z - z.mean(0)).square().sum()
        here = torch.stack(
            [z.new_ones(z.shape[1]) if e.present is None else e.present for e in experts.values()]
        ).unsqueeze(2)
        mean = (z * here).sum(0) / here.sum(0).clamp(min=1)
        return ((z - mean).square() * here).sum()

    def _discriminate(self, batch: Minibatch, c: dict[str, Tensor]) -> Tensor:
        """Terms 7 and 8 without their sign: weight times the cross entropies of all heads at work."""
        heads: list[int] = []
        labels: list[Tensor] = []
        weights: list[Tensor | None] = []
        for name in c:
            if name == "joint":
                heads.append(len(self.layout.modalities))
                labels.append(batch.batch)
                weights.append(None)
                continue
            heads.append(self.layout.modalities.index(name))
            labels.append(self.get_buffer(f"_class_{name}")[batch.batch])
            rows = batch.x[name].rows
            weights.append(
                None if rows is None else torch.zeros(batch.n, device=rows.device).index_fill_(0, rows, 1.0)
            )
        with self.autocast():
            entropies: Tensor = self.discriminators(torch.stack(list(c.values())), heads, labels, weights)
            return self.config.weight_adversarial * entropies
