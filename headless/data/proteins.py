"""Protein names: one name for an antibody however a file writes it, the gene it stands for, isotype controls.

``resources/proteins/aliases.csv`` lists the antibodies of the common human and mouse panels: canonical name, encoding
genes (the best marker first), other spellings. CD numbers are canonical where there is one. Names outside the table
are still matched without regard to case, separators and vendor tags.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from headless import resources

_GREEK: Final[Mapping[int, str]] = str.maketrans(
    {"α": "a", "β": "b", "γ": "g", "δ": "d", "ε": "e", "κ": "k", "λ": "l", "µ": "m"}
)
#: ``Hu.CD4``, ``HuMs.CD44``, ``HuMsRt.CD278``, ``anti-mouse/human CD44``
_SPECIES = r"(?:human|hu|hs|mouse|mus|ms|mu|rat|rt)+"
_TAG_BEFORE = re.compile(
    rf"^(?:adts?|ab|abs|antibody|prot|protein|anti|{_SPECIES}(?:[/_.-]{_SPECIES})*|[abcd]\d{{4}})[-_. :/]+(?=\w)",
    re.I,
)
_TAG_AFTER = re.compile(
    r"[-_. :]+(?:total[-_. ]?seq(?:[-_. ]?[a-d])?|ts[abcd]|[abcd]\d{4}|adt|prot|protein|antibody|pabo|[acgt]{12,})$",
    re.I,
)
_BRACKETS = re.compile(r"[(\[]([^)\]]*)[)\]]")
_SEPARATORS = re.compile(r"[^a-z0-9]+")
_ISOTYPE = re.compile(
    r"isotype|^iso-?(ctrl|control)|^(mopc|mpc)-?\d+|^(rtk|htk)\d+|"
    r"^((anti|mouse|ms|rat|rt|armenian|arm|hamster|ham|syrian|human|hu|goat|rabbit)-)*igg(\d[abc]?)?"
    r"(-?(kappa|k|lambda|l|ctrl|ctl|control|ctr|ms|mouse|rat|hamster|fitc|mopc|rtk\d*|\d+))*$"
)
_CD = re.compile(r"^cd(\d+)([a-z]*)$")
_NUMBERED = re.compile(r"^(.+)-(\d|recombinant)$")


@dataclass(frozen=True)
class Protein:
    """What a name says: the protein, which of several antibodies against it (``""`` = not said), genes, isotype."""

    name: str
    antibody: str = ""
    genes: tuple[str, ...] = ()
    isotype: bool = False


@dataclass(frozen=True)
class _Entry:
    name: str
    genes: tuple[str, ...]
    variant_of: str


@cache
def _table() -> Mapping[str, _Entry]:
    """Normalised spelling -> entry. A spelling belongs to one entry only (tested)."""
    found: dict[str, _Entry] = {}
    with resources.path("proteins", "aliases.csv").open("r", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            genes = tuple(gene for gene in row["genes"].split(";") if gene)
            entry = _Entry(row["name"], genes, row["variant_of"])
            for spelling in (row["name"], *row["aliases"].split(";")):
                if spelling:
                    found.setdefault(key(spelling), entry)
                    found.setdefault(_compact(key(spelling)), entry)
    return found


def key(name: str) -> str:
    """Lower case, Greek letters spelt, every run of separators one hyphen: ``PD.1`` and ``pd-1`` are the same."""
    return _SEPARATORS.sub("-", name.lower().translate(_GREEK)).strip("-")


def recognise(name: str) -> Protein:
    """What an antibody's name in a file means.

    Vendor tags (``ADT_``, ``_TotalSeqB``, ``A0034_``, ``anti-human``, barcode sequences) go; brackets and case do not
    matter; ``CD3-1`` is antibody 1 against CD3.
    """
    bare = _bare(name)
    whole = key(bare)
    if _ISOTYPE.search(whole) or _ISOTYPE.search(key(name)):
        return Protein(_shown(bare), isotype=True)
    outside = _BRACKETS.sub(" ", bare)
    for text in (bare, outside, *_BRACKETS.findall(bare)):
        found = _look_up(key(text))
        if found:
            return found
    head, _, tail = bare.replace(" ", "_").partition("_")
    first, rest = _look_up(key(head)), _look_up(key(tail))
    if first and not first.antibody:  # CD127_IL7R, Hu.CD4_RPA-T4
        return first if rest and rest.name == first.name else Protein(first.name, tail, first.genes)
    return Protein(_shown(outside.strip() or bare))


def harmonise(panels: Sequence[Sequence[str]]) -> list[list[Protein]]:
    """The proteins of several files' panels; proteins of equal ``name`` are the same feature.

    Several antibodies against one protein stay apart: the first keeps the plain name, the others are called
    ``CD3-2`` and so on. A file that has just one antibody against a protein joins the first of the others, unless
    they share an antibody of that number. Within a file every name is unique.
    """
    read = [[recognise(name) for name in panel] for panel in panels]
    several: set[str] = set()
    used: dict[str, set[str]] = defaultdict(set)
    for panel in read:
        counts = Counter(map(_identity, panel))
        several |= {base for base, n in counts.items() if n > 1}
        for protein in panel:
            used[_identity(protein)].add(protein.antibody)
    # CD8a is CD8; it keeps its own name where no file says just CD8.
    several |= {base for base, antibodies in used.items() if len(antibodies) == 1 and antibodies <= _variants()}
    spelling = _spellings(read)
    return [_named(panel, several, spelling) for panel in read]


def mouse_symbol(gene: str) -> str:
    """The mouse spelling of a gene symbol (``CD3E`` -> ``Cd3e``); H2 genes and mouse symbols stay as they are."""
    return gene if gene.startswith("H2-") or not gene.isupper() else gene.capitalize()


def _named(panel: Sequence[Protein], several: set[str], spelling: Mapping[str, str]) -> list[Protein]:
    taken: set[str] = set()
    result = []
    for protein in panel:
        base, antibody = _identity(protein), protein.antibody
        name = spelling[base]
        if base in several and antibody not in ("", "1"):
            name = antibody if antibody in _variants() else f"{name}-{antibody}"
        number = 2
        unique = name
        while unique in taken:
            unique = f"{name}-{number}"
            number += 1
        taken.add(unique)
        result.append(Protein(unique, antibody, protein.genes, protein.isotype))
    return result


def _identity(protein: Protein) -> str:
    return _compact(key(protein.name))


def _spellings(panels: Sequence[Sequence[Protein]]) -> dict[str, str]:
    """One spelling a protein whatever the order of files: the table's, else the one with most capitals."""
    found: dict[str, str] = {}
    for panel in panels:
        for protein in panel:
            base = _identity(protein)
            rank = (-sum(map(str.isupper, protein.name)), protein.name)
            if base not in found or rank < (-sum(map(str.isupper, found[base])), found[base]):
                found[base] = protein.name
    return found


@cache
def _variants() -> frozenset[str]:
    return frozenset(entry.name for entry in _table().values() if entry.variant_of)


def _bare(name: str) -> str:
    name = name.strip().partition("|")[0]  # BD AbSeq: CD3:UCHT1|CD3E|AHS0231|pAbO
    before = None
    while before != name:
        before = name
        name = _TAG_BEFORE.sub("", _TAG_AFTER.sub("", name)).strip()
    head, colon, _ = name.partition(":")
    return head if colon and _look_up(key(head)) else name


def _look_up(spelling: str) -> Protein | None:
    table = _table()
    entry = table.get(spelling)
    if entry is None and not re.search(r"\d-\d", spelling):  # cd3-1 is not cd31
        entry = table.get(_compact(spelling))
    if entry:
        return _protein(entry)
    numbered = _NUMBERED.match(spelling) or re.match(r"^(.+?)-?(recombinant)$", spelling)
    if numbered:
        base = _look_up(numbered.group(1))
        if base and not base.antibody:
            return Protein(base.name, numbered.group(2), base.genes)
    return None


def _protein(entry: _Entry) -> Protein:
    if entry.variant_of:
        return Protein(entry.variant_of, entry.name, entry.genes)
    return Protein(entry.name, "", entry.genes)


def _compact(spelling: str) -> str:
    return spelling.replace("-", "")


def _shown(name: str) -> str:
    match = _CD.match(_compact(key(name)))
    if match and not re.search(r"\d[^A-Za-z0-9]+\d", name):
        return f"CD{match.group(1)}{match.group(2)}"
    return re.sub(r"\s+", "_", name.strip())
