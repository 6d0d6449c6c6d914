from __future__ import annotations

import csv
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import pandas as pd
import pytest

from headless import resources
from headless.data import proteins, union


@pytest.mark.parametrize(
    ("written", "name", "gene"),
    [
        ("CD3", "CD3", "CD3E"),
        ("cd8b", "CD8b", "CD8B"),
        ("CD45RA", "CD45RA", "PTPRC"),
        ("ADT_CD127_TotalSeqB", "CD127", "IL7R"),
        ("CD127-TotalSeq-C", "CD127", "IL7R"),
        ("IL-7Ra", "CD127", "IL7R"),
        ("PD-1", "CD279", "PDCD1"),
        ("CD279 (PD-1)", "CD279", "PDCD1"),
        ("pd.1", "CD279", "PDCD1"),
        ("TIGIT_TSB", "TIGIT", "TIGIT"),
        ("CD19", "CD19", "CD19"),
        ("anti-human CD20", "CD20", "MS4A1"),
        ("A0047_CD56 (NCAM)", "CD56", "NCAM1"),
        ("CD16", "CD16", "FCGR3A"),
        ("CD11c_protein", "CD11c", "ITGAX"),
        ("HLA.DR", "HLA-DR", "HLA-DRA"),
        ("hladr", "HLA-DR", "HLA-DRA"),
        ("HuMs.CD44", "CD44", "CD44"),
        ("Hu.CD4_RPA-T4", "CD4", "CD4"),
        ("CD3-CTCATTGTAACTCCT", "CD3", "CD3E"),
        ("CD3:UCHT1|CD3E|AHS0231|pAbO", "CD3", "CD3E"),
        ("TCR γ/δ", "TCRgd", "TRDC"),
    ],
)
def test_an_antibody_is_recognised_however_it_is_written(written: str, name: str, gene: str) -> None:
    found = proteins.recognise(written)
    assert (found.name, found.genes[0], found.isotype) == (name, gene, False)


def test_a_number_after_a_separator_is_another_antibody_not_another_protein() -> None:
    assert proteins.recognise("CD3-1") == proteins.Protein("CD3", "1", ("CD3E", "CD3D", "CD3G"))
    assert proteins.recognise("CD31").genes == ("PECAM1",)


@pytest.mark.parametrize(
    "written",
    [
        "IgG1", "IgG2a", "Mouse IgG2b, κ isotype Ctrl", "IgG1_control_TotalSeqB", "rat-IgG2b", "Isotype_MOPC.21",
        "RTK2758",
    ],
)
def test_isotype_controls_are_recognised(written: str) -> None:
    assert proteins.recognise(written).isotype


@pytest.mark.parametrize("written", ["IgM", "IgD", "IgG-Fc", "Ig light chain kappa", "CD79a"])
def test_immunoglobulins_that_are_measured_on_purpose_are_no_controls(written: str) -> None:
    assert not proteins.recognise(written).isotype


def test_names_that_no_table_knows_match_without_regard_to_case_and_tags() -> None:
    first, second = proteins.harmonise([["Foo-9x"], ["ADT_FOO.9x_TotalSeqA"]])
    assert first[0].name == second[0].name
    assert first[0].genes == ()


def test_several_antibodies_against_a_protein_stay_apart_and_the_first_joins_plain_names() -> None:
    for order in permutations([["CD3-1", "CD3-2"], ["CD3"], ["cd3.2", "cd3.1"]]):
        found = [[p.name for p in panel] for panel in proteins.harmonise(order)]
        assert found[order.index(["CD3-1", "CD3-2"])] == ["CD3", "CD3-2"]
        assert found[order.index(["cd3.2", "cd3.1"])] == ["CD3-2", "CD3"]
        assert found[order.index(["CD3"])] == ["CD3"]


def test_a_lone_second_antibody_is_the_protein_itself() -> None:
    assert [p.name for panel in proteins.harmonise([["CD57_Recombinant"], ["CD57"]]) for p in panel] == ["CD57", "CD57"]


def test_cd8a_is_cd8_unless_a_file_has_both() -> None:
    def harmonised(*panels: list[str]) -> list[list[str]]:
        return [[p.name for p in panel] for panel in proteins.harmonise(panels)]

    assert harmonised(["CD8a"], ["cd8a"]) == [["CD8a"], ["CD8a"]]
    assert harmonised(["CD8a"], ["CD8"]) == [["CD8"], ["CD8"]]
    assert harmonised(["CD8", "CD8a"], ["CD8a"]) == [["CD8", "CD8a"], ["CD8a"]]


def test_names_of_a_panel_stay_unique() -> None:
    (panel,) = proteins.harmonise([["CD4", "cd4", "ADT_CD4"]])
    assert [p.name for p in panel] == ["CD4", "CD4-2", "CD4-3"]


def test_no_spelling_of_the_table_stands_for_two_proteins() -> None:
    owners = defaultdict(set)
    with resources.path("proteins", "aliases.csv").open("r", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for spelling in filter(None, (row["name"], *row["aliases"].split(";"))):
            owners[proteins.key(spelling).replace("-", "")].add(row["name"])
    assert len(rows) > 300
    assert not {spelling: names for spelling, names in owners.items() if len(names) > 1}


def test_genes_are_written_as_the_species_of_the_rna_writes_them() -> None:
    panel = [pd.DataFrame(index=["CD3", "CD45R-B220", "I-A/I-E"])]
    human = union.antibodies(panel, rna=pd.Index(["CD3E", "PTPRC", "ACTB"])).features
    mouse = union.antibodies(panel, rna=pd.Index(["Cd3e", "Ptprc", "Actb"])).features
    assert human["gene"].tolist()[:2] == ["CD3E", "PTPRC"]
    assert mouse["gene"].tolist() == ["Cd3e", "Ptprc", "H2-Ab1"]
    assert mouse.loc["CD3", "genes"] == "Cd3e;Cd3d;Cd3g"


def test_controls_named_in_the_file_are_left_out_or_kept() -> None:
    tables = [pd.DataFrame({"isotype_control": ["False", "True"]}, index=["CD4", "strange"])]
    without = union.antibodies(tables)
    assert without.features.index.tolist() == ["CD4"]
    assert without.columns[0].tolist() == [0, -1]
    assert "strange" in without.notes[-1]
    kept = union.antibodies(tables, drop_isotype_controls=False).features
    assert kept["isotype_control"].tolist() == [False, True]


def test_the_panels_of_real_data_sets_are_known_and_overlap(shared_data: Path) -> None:
    from headless.data.read import read_matrix

    files = ("midas_quickstart_pbmc", "asap_pbmc_adt_only", "bmmc_neurips_cite", "pbmc10k_cite")
    panels = [
        list(read_matrix(shared_data / f"{name}.h5mu", "mod/adt", "X", "adt").features.index) for name in files
    ]
    found = proteins.harmonise(panels)
    assert [name for panel in found for name in panel if not name.genes and not name.isotype] == []
    quickstart, asap, bmmc, pbmc = ({p.name for p in panel if not p.isotype} for panel in found)
    assert (len(quickstart), len(asap), len(pbmc)) == (224, 216, 14)
    assert pbmc <= asap
    assert pbmc <= quickstart
    assert len(quickstart & asap) == 215
    assert len(bmmc & quickstart) == 112
