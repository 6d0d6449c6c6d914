"""Enrichment of lists of features in sets of features, by the hypergeometric test. Torch-free.

No sets ship with the program: the user gives gene sets (a GMT file or a table in memory), or which motif is found in
which peak.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from headless.errors import MosaicError, from_os_error

#: Peaks are matched within this many classes of GC content with as many peaks each.
GC_CLASSES = 20
#: Background peaks to a chosen peak, at most.
MOST_BACKGROUND = 50


def read_gmt(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Gene sets of a GMT file: one a line, name, description, then genes, separated by tabs.

    Raises
    ------
    MosaicError
        ``data.missing_file``, ``data.unreadable`` if a line has no gene, with its number.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise MosaicError("data.missing_file", "The file of gene sets does not exist.", file=path) from None
    except UnicodeDecodeError:
        raise MosaicError("data.unreadable", "The file of gene sets is not a text file.", file=path) from None
    except OSError as error:
        raise from_os_error(error, path, "read the gene sets") from error
    sets = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        genes = tuple(dict.fromkeys(gene.strip() for gene in rest[1:] if gene.strip()))
        if not genes:
            raise MosaicError(
                "data.unreadable",
                f"Line {number} of the gene sets has no genes.",
                "A GMT file has a name, a description and genes on each line, separated by tabs.",
                file=path,
            )
        sets[name.strip()] = genes
    return sets


def enrichment(
    chosen: Collection[str], background: Collection[str], sets: Mapping[str, Collection[str]] | str | Path
) -> pd.DataFrame:
    """Which sets are found among the chosen features more often than among those that could have been chosen?

    Parameters
    ----------
    chosen
        Features of a list; those outside the background do not count.
    background
        All features that were decoded.
    sets
        Set -> features, or the path of a GMT file.

    Returns
    -------
    One row a set that meets the background, by p: ``set``, ``size`` (in the background), ``chosen``, ``overlap``,
    ``expected``, ``p`` (hypergeometric, upper tail), ``q`` (Benjamini-Hochberg), ``features`` (joined by ``;``).
    """
    from scipy.stats import false_discovery_control, hypergeom

    if isinstance(sets, str | Path):
        sets = read_gmt(sets)
    everything = set(background)
    picked = set(chosen) & everything
    rows = []
    for name, members in sets.items():
        own = set(members) & everything
        if own:
            both = sorted(own & picked)
            p = float(hypergeom.sf(len(both) - 1, len(everything), len(own), len(picked)))
            expected = len(own) * len(picked) / len(everything)
            rows.append((name, len(own), len(picked), len(both), expected, p, ";".join(both)))
    columns = ["set", "size", "chosen", "overlap", "expected", "p", "features"]
    table = pd.DataFrame(rows, columns=columns).sort_values(["p", "set"], ignore_index=True)
    p_values = table["p"].to_numpy(dtype=float)
    q = false_discovery_control(p_values) if len(table) else p_values
    table.insert(columns.index("p") + 1, "q", q)
    return table


def program_enrichment(
    table: pd.DataFrame,
    sets: Mapping[str, Collection[str]] | str | Path,
    top: int | None = 100,
    directions: Sequence[Literal["up", "down"]] = ("up", "down"),
) -> pd.DataFrame:
    """Enrichment of the ranked lists of every dimension of a table of programs.

    Parameters
    ----------
    table
        As :attr:`headless.tasks.programs.Programs.tables` has it; its features are the background.
    top
        Features of each list that are tested; ``None`` = all.

    Returns
    -------
    Columns ``dimension``, ``direction``, then those of :func:`enrichment`; q within a list.
    """
    if isinstance(sets, str | Path):
        sets = read_gmt(sets)
    background = set(table["feature"])
    found = []
    for dimension, own in table.groupby("dimension", sort=True):
        for direction in directions:
            rank = own[f"rank_{direction}"]
            here = rank.notna() if top is None else (rank <= top).fillna(False)
            part = enrichment(own["feature"][here.astype(bool)], background, sets)
            part.insert(0, "direction", direction)
            part.insert(0, "dimension", dimension)
            found.append(part)
    return pd.concat(found, ignore_index=True)


def motif_enrichment(
    chosen: Collection[str],
    table: pd.DataFrame,
    gc: Mapping[str, float] | pd.Series[Any] | None,
    seed: int = 0,
) -> pd.DataFrame:
    """Which motifs are found in the chosen peaks more often than in other peaks of the same GC content?

    Parameters
    ----------
    chosen
        Peaks of a list.
    table
        Peaks x motifs: true (or not zero) where the motif is found; its peaks are those that could be chosen.
    gc
        Share of G and C of each peak.
    seed
        Random state of the draw of background peaks.

    Returns
    -------
    As :func:`enrichment`, a set being a motif.

    Raises
    ------
    MosaicError
        ``model.cannot`` without GC contents: motifs would be found wherever peaks are rich in G and C.
    """
    if gc is None:
        raise MosaicError(
            "model.cannot",
            "Motifs cannot be tested without the GC content of the peaks: GC-rich peaks hold more of most motifs, "
            "whatever they do.",
            "Give the share of G and C of every peak.",
            field="gc",
        )
    content = pd.Series(gc, dtype=float).reindex(table.index)
    known = content.notna().to_numpy()
    table, content = table[known], content[known]
    picked = table.index.isin(list(chosen))
    classes = pd.qcut(content.rank(method="first"), min(GC_CLASSES, max(1, len(content))), labels=False).to_numpy()
    random = np.random.default_rng(seed)
    here = [(np.flatnonzero(picked & (classes == c)), np.flatnonzero(~picked & (classes == c))) for c in set(classes)]
    # As many background peaks to a chosen one in every class, so that both have the same GC content.
    ratio = min((len(other) / len(own) for own, other in here if len(own)), default=0.0)
    ratio = min(ratio, MOST_BACKGROUND)
    drawn = [random.choice(other, int(ratio * len(own)), replace=False) for own, other in here if len(own)]
    background = table.index[np.concatenate([np.flatnonzero(picked), *drawn]).astype(int)]
    sets = {str(motif): table.index[table[motif].to_numpy(dtype=bool)] for motif in table.columns}
    return enrichment(set(table.index[picked]), background, sets)
