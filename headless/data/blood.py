"""The biology of the simulated blood sample: cell types, their programs, genes, proteins, peaks and their links.

Ten blood cell types share latent programs along a hierarchy (all T cells share one, naive cells another, and killer
T cells borrow the cytotoxic one of NK cells), so that related types lie close to each other. Markers carry their real
symbols and hg38 coordinates (``resources/samples``, facts from GENCODE); ``SIM...`` features fill up the numbers
that were asked for. Nothing here is sampled from real cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float32]

#: Programs that a cell type switches on, and three that vary from cell to cell within every type.
IDENTITY: Final = (
    "lymphoid", "t_cell", "cd4", "cd8", "naive", "memory", "cytotoxic", "nk", "b_cell", "myeloid", "cd14_mono",
    "cd16_mono", "dendritic", "mhc_ii", "platelet",
)  # fmt: skip
STATES: Final = ("interferon", "activation", "cycling")
PROGRAMS: Final = IDENTITY + STATES

#: Cell type -> share of the cells, and how strongly each identity program is on.
TYPES: Final = MappingProxyType(
    {
        "CD4 naive T": (0.190, {"lymphoid": 1.0, "t_cell": 1.0, "cd4": 1.0, "naive": 1.0}),
        "CD4 memory T": (0.150, {"lymphoid": 1.0, "t_cell": 1.0, "cd4": 1.0, "memory": 1.0}),
        "CD8 naive T": (0.080, {"lymphoid": 1.0, "t_cell": 1.0, "cd8": 1.0, "naive": 1.0}),
        "CD8 effector T": (0.110, {"lymphoid": 1.0, "t_cell": 1.0, "cd8": 0.9, "cytotoxic": 0.85, "memory": 0.3}),
        "NK": (0.100, {"lymphoid": 1.0, "nk": 1.0, "cytotoxic": 1.0}),
        "B": (0.120, {"lymphoid": 1.0, "b_cell": 1.0, "mhc_ii": 0.9}),
        "CD14 Mono": (0.170, {"myeloid": 1.0, "cd14_mono": 1.0, "mhc_ii": 0.6}),
        "CD16 Mono": (0.040, {"myeloid": 1.0, "cd16_mono": 1.0, "mhc_ii": 0.7}),
        "Dendritic": (0.025, {"myeloid": 0.7, "dendritic": 1.0, "mhc_ii": 1.1}),
        "Platelet": (0.015, {"platelet": 1.0}),
    }
)

#: Lengths of the standard chromosomes of hg38.
CHROMOSOMES: Final = MappingProxyType(
    {
        "chr1": 248956422, "chr2": 242193529, "chr3": 198295559, "chr4": 190214555, "chr5": 181538259,
        "chr6": 170805979, "chr7": 159345973, "chr8": 145138636, "chr9": 138394717, "chr10": 133797422,
        "chr11": 135086622, "chr12": 133275309, "chr13": 114364328, "chr14": 107043718, "chr15": 101991189,
        "chr16": 90338345, "chr17": 83257441, "chr18": 80373285, "chr19": 58617616, "chr20": 64444167,
        "chr21": 46709983, "chr22": 50818468, "chrX": 156040895,
    }
)  # fmt: skip

PEAK_WIDTH: Final = 500
_GAP = 50  # between neighbouring peaks
_MARKER_FOLD = 3.4  # natural log of a marker's fold change where its program is fully on
_LINKED = 0.7  # share of the peaks that follow a gene


@dataclass(frozen=True)
class Biology:
    """Features and their parameters, before any cell.

    Attributes
    ----------
    features
        Modality -> table of features, in the columns of :class:`headless.data.mosaic.Mosaic`.
    base
        Modality -> ``(D,)``: log abundance (rna), log background (adt), logit of being open (atac), all programs off.
    loadings
        Modality -> ``(P, D)``: what one unit of each program adds on that scale (adt: to the activity, see
        ``amplitude``).
    amplitude
        ``(D_adt,)``: counts of a fully active protein; 0 for isotype controls.
    links
        One row a linked pair: ``peak``, ``gene``, ``kind`` (promoter or enhancer), ``distance`` (bp from the
        transcription start to the centre of the peak), ``weight`` (the gene's loadings times this are the peak's).
    """

    features: dict[str, pd.DataFrame]
    base: dict[str, Floats]
    loadings: dict[str, Floats]
    amplitude: Floats
    links: pd.DataFrame


def design(n_genes: int, n_proteins: int, n_peaks: int, seed: int) -> Biology:
    """The biology of a sample with so many features; the same for the same numbers and seed.

    A modality with 0 features is absent.
    """
    genes, gene_base, gene_loadings = _genes(n_genes, np.random.default_rng([seed, 1]))
    features, base, loadings = {"rna": genes}, {"rna": gene_base}, {"rna": gene_loadings}
    amplitude: Floats = np.zeros(0, np.float32)
    if n_proteins:
        rng = np.random.default_rng([seed, 2])
        features["adt"], base["adt"], loadings["adt"], amplitude = _proteins(n_proteins, genes, gene_loadings, rng)
    peaks, base_atac, loadings_atac, links = _peaks(
        n_peaks, genes, gene_base, gene_loadings, np.random.default_rng([seed, 3])
    )
    if n_peaks:
        features["atac"], base["atac"], loadings["atac"] = peaks, base_atac, loadings_atac
    return Biology(features, base, loadings, amplitude, links)


def type_programs() -> Floats:
    """``(n_types, n_identity_programs)``: how strongly each type has each identity program."""
    return np.array([[on.get(p, 0.0) for p in IDENTITY] for _, on in TYPES.values()], np.float32)


@cache
def _table(name: str) -> pd.DataFrame:
    import pandas as pd

    from headless import resources

    with resources.path(f"samples/{name}.csv").open("r", encoding="utf-8") as file:
        table: pd.DataFrame = pd.read_csv(file, keep_default_na=False)
    return table


def _weights(text: str) -> Floats:
    """``"t_cell:1 nk:0.5"`` -> ``(P,)``."""
    weights = np.zeros(len(PROGRAMS), np.float32)
    for item in text.split():
        name, _, value = item.partition(":")
        weights[PROGRAMS.index(name)] = float(value)
    return weights


def _genes(n: int, rng: np.random.Generator) -> tuple[pd.DataFrame, Floats, Floats]:
    import pandas as pd

    known = _table("blood_genes").head(n)
    n_fill = n - len(known)
    names = list(CHROMOSOMES)
    lengths = np.array(list(CHROMOSOMES.values()), float)
    # Fillers tile the genome evenly enough to have room for their peaks.
    chrom = rng.choice(names, n_fill, p=lengths / lengths.sum())
    start = (rng.uniform(0.02, 0.98, n_fill) * [CHROMOSOMES[c] for c in chrom]).astype(np.int64)
    fill = pd.DataFrame(
        {
            "chrom": chrom,
            "start": start,
            "end": start + rng.integers(2_000, 60_000, n_fill),
            "strand": rng.choice(["+", "-"], n_fill),
        },
        index=[f"SIM{i:05d}" for i in range(1, n_fill + 1)],
    )
    table = pd.concat([known.set_index("symbol")[["chrom", "start", "end", "strand"]], fill])
    table.index.name = None
    base = np.r_[known["abundance"], rng.normal(-1.2, 1.2, n_fill)].astype(np.float32)
    base[: len(known)] += rng.normal(0, 0.3, len(known)).astype(np.float32)
    markers = np.array([_weights(text) for text in known["programs"]], np.float32).reshape(-1, len(PROGRAMS)).T
    return table, base, np.hstack([_MARKER_FOLD * markers, _random_loadings(n_fill, 0.08, 0.8, rng)])


def _random_loadings(n: int, share: float, scale: float, rng: np.random.Generator) -> Floats:
    shape = (len(PROGRAMS), n)
    return np.where(rng.random(shape) < share, rng.normal(0, scale, shape), 0.0).astype(np.float32)


def _proteins(
    n: int, genes: pd.DataFrame, gene_loadings: Floats, rng: np.random.Generator
) -> tuple[pd.DataFrame, Floats, Floats, Floats]:
    import pandas as pd

    known = _table("blood_proteins").head(n)
    n_fill = n - len(known)
    fill = pd.DataFrame({"name": [f"SIM-P{i:03d}" for i in range(1, n_fill + 1)], "gene": "", "isotype_control": False})
    table = pd.concat([known, fill], ignore_index=True).set_index("name")[["gene", "isotype_control"]]
    table.index.name = None
    table["isotype_control"] = table["isotype_control"].astype(bool)
    own = np.array([_weights(text) for text in known["programs"]], np.float32).T
    activity = np.hstack([own, _random_loadings(n_fill, 0.15, 0.7, rng)])
    # A protein follows its gene in part only: the rest is regulated after transcription.
    column = genes.index.get_indexer(pd.Index(table["gene"]))
    through_gene = np.flatnonzero(column >= 0)
    gene_part = gene_loadings[:, column[through_gene]] / _MARKER_FOLD
    activity[:, through_gene] = 0.7 * activity[:, through_gene] + 0.3 * gene_part
    amplitude = np.exp(rng.normal(np.log(120), 0.6, n))
    amplitude[table["isotype_control"].to_numpy()] = 0
    background = rng.normal(np.log(5), 0.5, n)
    return table, background.astype(np.float32), activity.astype(np.float32), amplitude.astype(np.float32)


def _peaks(
    n: int, genes: pd.DataFrame, gene_base: Floats, gene_loadings: Floats, rng: np.random.Generator
) -> tuple[pd.DataFrame, Floats, Floats, pd.DataFrame]:
    """Promoters first (of markers before fillers), then enhancers within 100 kb, then peaks that follow no gene."""
    import pandas as pd

    usable = np.flatnonzero(genes["chrom"].isin(CHROMOSOMES))
    n_linked = int(_LINKED * n) if len(usable) else 0
    n_promoters = min(n_linked * 3 // 5, len(usable))
    n_enhancers = n_linked - n_promoters
    gene = np.r_[usable[:n_promoters], rng.choice(usable, n_enhancers) if n_enhancers else usable[:0]]
    kind = np.repeat(["promoter", "enhancer"], [n_promoters, n_enhancers])
    away = rng.integers(2_000, 100_000, n_linked) * rng.choice([-1, 1], n_linked)
    away[:n_promoters] = rng.integers(-300, 300, n_promoters)
    rows: Any = genes.iloc[gene]
    tss = np.where(rows["strand"] == "+", rows["start"], rows["end"]).astype(np.int64)
    names = list(CHROMOSOMES)
    lengths = np.array(list(CHROMOSOMES.values()), np.int64)
    free = rng.choice(len(names), n - n_linked, p=lengths / lengths.sum())
    chrom = np.r_[pd.Categorical(rows["chrom"], categories=names).codes, free].astype(np.int64)
    centre = np.r_[tss + away, (rng.uniform(0.01, 0.99, n - n_linked) * lengths[free]).astype(np.int64)]
    order, start = _lay_out(chrom, centre - PEAK_WIDTH // 2)
    chrom = chrom[order]

    weight = np.r_[rng.uniform(0.6, 0.9, n_promoters), rng.uniform(0.6, 1.1, n_enhancers)].astype(np.float32)
    base = rng.normal(0, 0.9, n)
    base[:n_linked] += np.where(kind == "promoter", 0.4 * gene_base[gene], -0.3)
    loadings = np.hstack([weight * gene_loadings[:, gene], _random_loadings(n - n_linked, 0.1, 0.8, rng)])
    chroms = np.array(names, dtype=object)[chrom]
    index = [f"{c}:{s}-{s + PEAK_WIDTH}" for c, s in zip(chroms, start, strict=True)]
    table = pd.DataFrame({"chrom": chroms, "start": start, "end": start + PEAK_WIDTH}, index=index)

    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    linked = place[:n_linked]
    links = pd.DataFrame(
        {
            "peak": table.index.to_numpy()[linked],
            "gene": rows.index.to_numpy(),
            "kind": kind,
            "distance": np.abs(start[linked] + PEAK_WIDTH // 2 - tss),
            "weight": weight,
        }
    )
    return table, base[order].astype(np.float32), loadings[:, order].astype(np.float32), links


def _lay_out(chrom: NDArray[np.int64], start: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order by chromosome and place, and starts pushed right where peaks would overlap."""
    order = np.lexsort((start, chrom))
    chrom, start = chrom[order], np.maximum(start[order], 0)
    step = PEAK_WIDTH + _GAP
    for first, last in _runs(chrom):
        steps = step * np.arange(last - first)
        start[first:last] = np.maximum.accumulate(start[first:last] - steps) + steps
    return order, start


def _runs(values: NDArray[np.int64]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.r_[True, values[1:] != values[:-1], True]) if len(values) else np.zeros(1, np.int64)
    return [(int(a), int(b)) for a, b in pairwise(edges)]
