"""A simulated blood-like mosaic whose truth is known: types, programs, links, batch effects and what was hidden.

Model, per cell c of batch b with latent programs z_c (:mod:`headless.data.blood`):

* RNA: counts ~ Poisson(Gamma noise x depth_c x softmax_g(base_g + z_c W_g + effect_bg)), depth log-normal;
* protein: the same noise around size_c x exp(effect_bp) x (background_p + amplitude_p x sigmoid(6 (z_c V_p - 1/2)));
* ATAC: open ~ Bernoulli(sigmoid(base_p + z_c U_p + effect_bp + log depth_c)), where a linked peak's U follows its
  gene's W.

Depths are set so that the share of non-zero entries is that of real data. Everything is made in blocks of cells, so a
large sample needs the memory of its sparse matrices and no more.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from headless.data.blood import IDENTITY, PROGRAMS, STATES, TYPES, Biology, Floats, design, type_programs
from headless.data.pattern import MODALITIES
from headless.errors import from_os_error

if TYPE_CHECKING:
    import pandas as pd

    from headless.data.mosaic import Mosaic

#: A CITE-seq, a 10x multiome, an ASAP-seq and a TEA-seq batch: every pair of modalities, and all three.
PATTERN: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "cite": ("rna", "adt"),
        "multiome": ("rna", "atac"),
        "asap": ("adt", "atac"),
        "tea": ("rna", "adt", "atac"),
    }
)

#: Where a written sample keeps the whole truth: in a folder of its own, so that adding the sample's folder to a
#: project does not add the answers.
TRUTH_FILE: Final = "sealed/truth.h5mu"

_DENSITY = {"rna": 0.12, "atac": 0.05}  # share of non-zero entries
_EFFECT = {"rna": 0.35, "adt": 0.30, "atac": 0.40}  # standard deviation of batch effects on features
_SPREAD = {"rna": 0.35, "adt": 0.25, "atac": 0.40}  # standard deviation of log depth within a batch
_MISSING = {"rna": 0.05, "adt": 0.15, "atac": 0.05}  # share of features that a batch did not measure
_SHAPE = {"rna": 4.0, "adt": 8.0}  # gamma noise: 1 / overdispersion
_BLOCK = 4_000_000  # dense entries made at a time


@dataclass(frozen=True)
class Truth:
    """What made the counts.

    Attributes
    ----------
    programs
        ``(n_cells, P)`` latent programs, columns named by ``headless.data.blood.PROGRAMS``.
    depth
        Modality -> ``(n_cells,)`` technical size of each cell, the batch's included.
    effects
        Modality -> ``(n_batches, D)`` batch effects on the features (log, or logit for ATAC).
    biology
        Features, loadings and peak-gene links.
    """

    programs: Floats
    depth: dict[str, Floats]
    effects: dict[str, Floats]
    biology: Biology


@dataclass(frozen=True)
class Simulated:
    """A simulated mosaic and its truth.

    Attributes
    ----------
    cells
        Index = unique cell names; columns ``batch``, ``barcode``, ``label`` (the cell type). Grouped by batch.
    pattern
        Batch -> modalities that are shown of it.
    counts
        Modality -> CSR float32 ``(n_cells, D)``: complete, hidden cells too, unless made with ``complete=False``
        (then their rows are empty).
    masks
        (batch, modality) -> ``(D,)`` bool, features measured there; absent = all of them.
    """

    cells: pd.DataFrame
    pattern: Mapping[str, tuple[str, ...]]
    features: Mapping[str, pd.DataFrame]
    counts: Mapping[str, Any]
    masks: Mapping[tuple[str, str], NDArray[np.bool_]]
    truth: Truth
    complete: bool

    @property
    def batches(self) -> tuple[str, ...]:
        """Names of the batches in the order of the cells."""
        return tuple(self.pattern)

    @property
    def links(self) -> pd.DataFrame:
        """True peak-gene links: ``peak``, ``gene``, ``kind``, ``distance``, ``weight``."""
        return self.truth.biology.links

    def cells_of(self, batch: str) -> NDArray[np.int64]:
        """Numbers of the cells of a batch."""
        return np.flatnonzero((self.cells["batch"] == batch).to_numpy())

    def expected(self, modality: str, cells: NDArray[np.int64], *, batch_effects: bool = True) -> Floats:
        """The means ``(len(cells), D)`` that the counts of ``cells`` were drawn around: the best imputation there is.

        Dense, so ask for some cells at a time. Without ``batch_effects`` the feature effects are left out.
        """
        return _means(modality, self.truth, cells, self._codes[cells] if batch_effects else None)

    @property
    def _codes(self) -> NDArray[np.int64]:
        names = {batch: i for i, batch in enumerate(self.batches)}
        return np.array([names[batch] for batch in self.cells["batch"]], dtype=np.int64)

    def to_mosaic(self, *, whole: bool = False) -> Mosaic:
        """The mosaic in memory; ``whole=True``: all modalities and features of all cells, for scoring.

        Raises
        ------
        ValueError
            If the whole was asked for of a sample made with ``complete=False``.
        """
        from headless.data.mosaic import Mosaic, Tile
        from headless.data.sources import MemoryRows

        if whole and not self.complete:
            raise ValueError("the sample was made with complete=False: what is hidden was never made")
        tiles = {}
        for batch, shown in self.pattern.items():
            numbers = self.cells_of(batch)
            for modality in self.features if whole else [m for m in self.features if m in shown]:
                mask = None if whole else self.masks.get((batch, modality))
                rows = self.counts[modality][numbers]
                if mask is not None:
                    rows = _only(rows, mask)
                tiles[batch, modality] = Tile(batch, modality, MemoryRows(rows), numbers, mask)
        return Mosaic(self.cells, self.batches, self.features, tiles, ("Simulated blood sample.",))

    def fingerprint(self) -> str:
        """SHA-256 over cells, features, masks and counts."""
        digest = hashlib.sha256()
        for column in (self.cells.index, self.cells["batch"], self.cells["label"]):
            digest.update("\n".join(map(str, column)).encode())
        for modality, x in self.counts.items():
            digest.update("\n".join([modality, *map(str, self.features[modality].index)]).encode())
            for part in (x.indptr.astype("<i8"), x.indices.astype("<i4"), x.data.astype("<f4")):
                digest.update(np.ascontiguousarray(part).data)
        for (batch, modality), mask in sorted(self.masks.items()):
            digest.update(f"{batch}/{modality}".encode() + np.packbits(mask).tobytes())
        return digest.hexdigest()

    def write(self, folder: str | Path) -> list[Path]:
        """Write one ``.h5mu`` file a batch, as a laboratory would hand it over, and the truth apart.

        ``obs`` holds ``batch`` and ``cell_type``; ``var`` of rna and atac ``chrom``, ``start``, ``end`` (hg38).
        Features that a batch did not measure are absent from its file. The truth (if complete) goes to
        ``sealed/truth.h5mu`` below ``folder``.

        Returns
        -------
        list of Path
            The files of the batches, without the truth.

        Raises
        ------
        MosaicError
            ``disk.*`` when the folder cannot be written.
        """
        folder = Path(folder)
        paths = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for batch, shown in self.pattern.items():
                paths.append(folder / f"{batch}.h5mu")
                _save(self._batch_parts(batch, shown), paths[-1])
            if self.complete:
                sealed = folder / TRUTH_FILE
                sealed.parent.mkdir(exist_ok=True)
                _save(self._truth_parts(), sealed)
        except OSError as error:
            raise from_os_error(error, folder, "write the sample") from error
        return paths

    def _batch_parts(self, batch: str, shown: Sequence[str]) -> dict[str, Any]:
        numbers = self.cells_of(batch)
        parts = {}
        for modality in self.features:
            if modality not in shown:
                continue
            mask = self.masks.get((batch, modality), np.ones(len(self.features[modality]), dtype=bool))
            parts[modality] = self._part(modality, numbers, np.flatnonzero(mask))
        return parts

    def _part(self, modality: str, cells: NDArray[np.int64], columns: NDArray[np.int64]) -> Any:
        import anndata

        table = self.cells.iloc[cells]
        obs = table[["batch"]].assign(cell_type=table["label"]).set_axis(table["barcode"].tolist())
        var = self.features[modality].iloc[columns]
        return anndata.AnnData(X=self.counts[modality][cells][:, columns], obs=obs, var=var.copy())

    def _truth_parts(self) -> dict[str, Any]:
        everything = np.arange(len(self.cells))
        parts = {}
        for modality, table in self.features.items():
            part = self._part(modality, everything, np.arange(len(table)))
            shown = {batch: modality in names for batch, names in self.pattern.items()}
            part.obs["measured"] = self.cells["batch"].map(shown).to_numpy(dtype=bool)
            part.obsm["programs"] = self.truth.programs
            part.varm["loadings"] = np.ascontiguousarray(self.truth.biology.loadings[modality].T)
            part.varm["batch_effects"] = np.ascontiguousarray(self.truth.effects[modality].T)
            part.uns.update(programs=np.array(PROGRAMS), batches=np.array(self.batches))
            parts[modality] = part
        if "atac" in parts:
            parts["atac"].uns["links"] = self.links
        return parts


def simulate(
    n_cells: int = 1500,
    pattern: Mapping[str, Sequence[str]] = PATTERN,
    batches: Mapping[str, float] | None = None,
    n_genes: int = 1000,
    n_proteins: int = 40,
    n_peaks: int = 3000,
    seed: int = 0,
    *,
    missing_features: bool = True,
    batch_effect: float = 1.0,
    complete: bool = True,
) -> Simulated:
    """Simulate a blood-like mosaic.

    Parameters
    ----------
    pattern
        Batch -> modalities that are measured in it (``rna``, ``adt``, ``atac``).
    batches
        Relative sizes of the batches; equal by default.
    n_genes, n_proteins, n_peaks
        Sizes of the unions of features. Markers come first, fillers after; 0 proteins or peaks: no such modality.
    missing_features
        Each batch misses a few features of its own (5 % of genes and peaks, 15 % of proteins; never a feature that
        no other batch with the modality has).
    batch_effect
        Strength of technical differences between batches; 0 = none.
    complete
        Make what the pattern hides as well, for scoring. ``False`` saves its time and memory; what is shown is the
        same.

    Raises
    ------
    ValueError
        Impossible arguments.
    """
    sizes = _sizes(n_cells, pattern, batches)
    biology = design(n_genes, n_proteins, n_peaks, seed)
    shown = {batch: tuple(m for m in MODALITIES if m in names) for batch, names in pattern.items()}
    for batch, names in pattern.items():
        unknown = [m for m in names if m not in biology.features]
        if unknown or not names:
            raise ValueError(f"batch {batch}: no such modality here: {', '.join(unknown) or 'none given'}")
    cells, types = _cells(sizes, np.random.default_rng([seed, 4]))
    truth = _truth(cells, types, sizes, biology, batch_effect, np.random.default_rng([seed, 5]))
    counts = {m: _counts(m, truth, sizes, shown, seed, complete) for m in biology.features}
    masks = _masks(shown, biology, np.random.default_rng([seed, 6])) if missing_features else {}
    return Simulated(cells, shown, biology.features, counts, masks, truth, complete)


def _sizes(n_cells: int, pattern: Mapping[str, Any], shares: Mapping[str, float] | None) -> dict[str, int]:
    if not pattern or n_cells < len(pattern):
        raise ValueError("each batch needs a cell")
    weights = np.array([1.0 if shares is None else shares[batch] for batch in pattern], float)
    edges = np.rint(np.r_[0, np.cumsum(weights / weights.sum())] * n_cells).astype(int)
    sizes = dict(zip(pattern, np.diff(edges).tolist(), strict=True))
    if min(sizes.values()) < 1:
        raise ValueError("each batch needs a cell")
    return sizes


def _cells(sizes: Mapping[str, int], rng: np.random.Generator) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    import pandas as pd

    shares = np.array([share for share, _ in TYPES.values()])
    n = sum(sizes.values())
    # Donors differ in composition: Dirichlet around the common shares.
    types = np.concatenate([rng.choice(len(shares), k, p=rng.dirichlet(80 * shares)) for k in sizes.values()])
    barcodes = _barcodes(n, rng)
    names = np.array(list(TYPES), dtype=object)
    table = pd.DataFrame(
        {
            "batch": np.repeat(np.array(list(sizes), dtype=object), list(sizes.values())),
            "barcode": barcodes,
            "label": names[types],
        },
        index=pd.Index(barcodes, dtype=object),
    )
    return table, types.astype(np.int64)


def _barcodes(n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Unique 10x-like barcodes: sixteen letters and ``-1``."""
    codes = np.unique(rng.integers(0, 4**16, n))
    while len(codes) < n:
        codes = np.unique(np.r_[codes, rng.integers(0, 4**16, n - len(codes))])
    codes = rng.permutation(codes)
    letters = np.frombuffer(b"ACGT", "S1")[(codes[:, None] >> (2 * np.arange(16))) & 3]
    return np.array([word.decode() + "-1" for word in letters.view("S16").ravel()], dtype=object)


def _truth(
    cells: pd.DataFrame,
    types: NDArray[np.int64],
    sizes: Mapping[str, int],
    biology: Biology,
    strength: float,
    rng: np.random.Generator,
) -> Truth:
    n = len(cells)
    identity = type_programs()[types] * np.exp(rng.normal(0, 0.18, (n, len(IDENTITY))))
    states = np.column_stack(
        [rng.gamma(0.6, 0.35, n), rng.gamma(1.0, 0.35, n), (rng.random(n) < 0.03) * rng.uniform(0.7, 1.1, n)]
    )
    assert states.shape[1] == len(STATES)
    programs = np.hstack([identity, states]).astype(np.float32)
    per_batch = list(sizes.values())
    depth, effects = {}, {}
    for modality, table in biology.features.items():
        spread = strength * _EFFECT[modality]
        effects[modality] = (spread * rng.normal(size=(len(sizes), len(table)))).astype(np.float32)
        batch_depth = np.repeat(strength * rng.normal(0, 0.25, len(sizes)), per_batch)
        depth[modality] = np.exp(batch_depth + rng.normal(0, _SPREAD[modality], n)).astype(np.float32)
    truth = Truth(programs, depth, effects, biology)
    sample = np.sort(rng.permutation(n)[:400])
    codes = np.repeat(np.arange(len(sizes)), per_batch)
    for modality in biology.features:
        if modality in _DENSITY:
            depth[modality] *= np.float32(_scale(modality, truth, sample, codes[sample]))
    return truth


def _scale(modality: str, truth: Truth, cells: NDArray[np.int64], codes: NDArray[np.int64]) -> float:
    """The factor on all depths that gives the wished share of non-zero entries, by bisection of its logarithm."""
    means = _means(modality, truth, cells, codes).astype(float)

    def density(factor: float) -> float:
        if modality == "atac":
            odds = factor * means / np.maximum(1 - means, 1e-9)
            return float((odds / (1 + odds)).mean())
        return float((1 - (1 + factor * means / _SHAPE[modality]) ** -_SHAPE[modality]).mean())

    low, high = np.log(1e-8), np.log(1e8)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if density(np.exp(middle)) < _DENSITY[modality] else (low, middle)
    return float(np.exp((low + high) / 2))


def _means(modality: str, truth: Truth, cells: NDArray[np.int64], codes: NDArray[np.int64] | None) -> Floats:
    """Means of the counts ``(n, D)``; ``codes`` are the batches of the cells, ``None`` = no batch effects."""
    biology = truth.biology
    linear = truth.programs[cells] @ biology.loadings[modality]
    effect = 0.0 if codes is None else truth.effects[modality][codes]
    depth = truth.depth[modality][cells, None]
    if modality == "adt":
        signal = biology.amplitude / (1 + np.exp(6 * (0.5 - linear)))
        result = depth * np.exp(effect) * (np.exp(biology.base["adt"]) + signal)
    elif modality == "atac":
        result = 1 / (1 + np.exp(-(linear + biology.base["atac"] + effect + np.log(depth))))
    else:
        linear += biology.base["rna"] + effect
        np.exp(linear, out=linear)
        linear *= depth * linear.shape[1] / linear.sum(axis=1, keepdims=True)
        result = linear
    return np.asarray(result, dtype=np.float32)


def _counts(
    modality: str,
    truth: Truth,
    sizes: Mapping[str, int],
    shown: Mapping[str, Sequence[str]],
    seed: int,
    complete: bool,
) -> Any:
    import scipy.sparse as sp

    width = len(truth.biology.features[modality])
    blocks = []
    first = 0
    for code, (batch, size) in enumerate(sizes.items()):
        if complete or modality in shown[batch]:
            for number, cells in enumerate(_blocks(first, size, width)):
                # A stream of its own for every block: what is shown does not depend on what else is made.
                rng = np.random.default_rng([seed, 7, MODALITIES.index(modality), code, number])
                means = _means(modality, truth, cells, np.full(len(cells), code))
                blocks.append(sp.csr_matrix(_draw(modality, means, rng)))
        else:
            nothing = np.zeros(0, np.int32)
            empty = (np.zeros(0, np.float32), nothing, np.zeros(size + 1, np.int32))
            blocks.append(sp.csr_matrix(empty, shape=(size, width)))
        first += size
    return sp.vstack(blocks, format="csr", dtype=np.float32)


def _blocks(first: int, size: int, width: int) -> Iterator[NDArray[np.int64]]:
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, size, step):
        yield np.arange(first + start, first + min(start + step, size))


def _draw(modality: str, means: Floats, rng: np.random.Generator) -> Floats:
    if modality == "atac":
        return (rng.random(means.shape, dtype=np.float32) < means).astype(np.float32)
    shape = np.float32(_SHAPE[modality])
    noise = rng.standard_gamma(shape, size=means.shape, dtype=np.float32)
    noise *= means / shape
    return rng.poisson(noise).astype(np.float32)


def _masks(
    shown: Mapping[str, Sequence[str]], biology: Biology, rng: np.random.Generator
) -> dict[tuple[str, str], NDArray[np.bool_]]:
    masks = {}
    for modality, table in biology.features.items():
        having = [batch for batch, names in shown.items() if modality in names]
        if len(having) < 2:
            continue
        measured = rng.random((len(having), len(table))) >= _MISSING[modality]
        # A feature of the union was measured somewhere.
        nowhere = np.flatnonzero(~measured.any(axis=0))
        measured[rng.integers(0, len(having), len(nowhere)), nowhere] = True
        masks.update({(batch, modality): measured[i] for i, batch in enumerate(having)})
    return masks


def _only(rows: Any, mask: NDArray[np.bool_]) -> Any:
    """The rows without what was not measured (same width)."""
    import scipy.sparse as sp

    return sp.csr_matrix(rows @ sp.diags(mask.astype(np.float32)))


def _save(parts: dict[str, Any], path: Path) -> None:
    import mudata

    with warnings.catch_warnings():
        # A protein may be named like its gene; readers keep modalities apart.
        warnings.simplefilter("ignore")
        with mudata.set_options(pull_on_update=False):
            whole = mudata.MuData(parts)
            whole.obs = next(iter(parts.values())).obs[["batch", "cell_type"]].copy()
            whole.write_h5mu(path)
