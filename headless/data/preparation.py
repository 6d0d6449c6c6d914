"""What is decided between the files and the mosaic: batches, pairing, quality control, features (torch-free)."""

from __future__ import annotations

from typing import Any, Literal

from headless.schema import Config, Field, Frozen

#: Key of ``Preparation.qc`` whose thresholds hold for every batch that has none of its own.
ALL_BATCHES = "*"


class BatchEdit(Frozen):
    """What happens to a batch: it gets another name, it loses a modality, or it is left out.

    Two batches with one name are merged.
    """

    name: str | None = Field(
        None, title="Name", tier="basic", min_length=1, help="Another name; batches that get the same name are merged."
    )
    exclude: bool = Field(False, title="Leave out", tier="basic", help="Leave the cells of this batch out.")
    without: tuple[str, ...] = Field(
        (), title="Modalities to leave out", tier="basic",
        help="Modalities of this batch that are not used: bad ones, or some that a benchmark hides.",
    )


class Thresholds(Frozen):
    """Quality limits of one modality in one batch; cells at a limit are kept, empty fields do not limit."""

    min_counts: float | None = Field(
        None, title="Counts at least", unit="counts", tier="basic", ge=0,
        help="Cells with fewer counts (RNA, protein) or fragments in peaks (ATAC) are left out.",
    )
    max_counts: float | None = Field(
        None, title="Counts at most", unit="counts", tier="basic", ge=0, help="Cells with more counts are left out."
    )
    min_features: int | None = Field(
        None, title="Features at least", unit="features", tier="basic", ge=0,
        help="Cells with fewer detected genes, proteins or peaks are left out.",
    )
    max_features: int | None = Field(
        None, title="Features at most", unit="features", tier="basic", ge=0,
        help="Cells with more detected genes, proteins or peaks are left out (doublets).",
    )
    max_mito: float | None = Field(
        None, title="Mitochondrial share at most", tier="basic", ge=0, le=1,
        help="Cells with a larger share of mitochondrial RNA counts (0 to 1) are left out.",
    )
    max_isotype: float | None = Field(
        None, title="Isotype control counts at most", unit="counts", ge=0,
        help="Cells that bind more isotype control antibody are left out (protein only).",
    )


class Preparation(Config):
    """How files become a mosaic. The defaults follow the offline preprocessing of the MIDAS paper where they can."""

    batches: dict[str, BatchEdit] = Field(
        default_factory=dict, title="Batches", tier="basic",
        help="Batches to rename, merge or leave out, by the name in the data; 'dataset:batch' if several files use it.",
    )
    pairing: Literal["union", "intersection"] = Field(
        "union", title="Cells of a batch", tier="basic",
        help="union: every barcode that any modality has; intersection: only barcodes that all modalities of the "
        "batch have.",
    )
    match_without_suffix: bool = Field(
        True, title="Match barcodes without '-1'",
        help="When the barcodes of two modalities of a batch share nothing but agree once an ending such as '-1' is "
        "left out, join them that way; the report tells it.",
    )
    duplicates: Literal["refuse", "first"] = Field(
        "refuse", title="Duplicate barcodes",
        help="What to do when a barcode stands twice in one modality of a batch that has several modalities, so that "
        "its partner is ambiguous: refuse the data, or keep the first.",
    )
    qc: dict[str, dict[str, Thresholds]] = Field(
        default_factory=dict, title="Quality limits", tier="basic",
        help="Limits by batch and modality; batch '*' stands for every batch without limits of its own.",
    )
    qc_drops: Literal["cell", "modality"] = Field(
        "cell", title="A failing cell loses",
        help="cell: a cell must pass in every modality that it has; modality: it only loses the one in which it fails.",
    )
    n_top_genes: int | None = Field(
        4000, title="Variable genes", unit="genes", tier="basic", ge=1,
        help="Highly variable genes, chosen batch by batch; empty = all genes. Panels that are not larger stay whole.",
    )
    hvg_flavor: Literal["seurat_v3", "polynomial"] = Field(
        "seurat_v3", title="Variable genes by",
        help="Variance after standardising with the trend of variance on mean: a loess curve (seurat_v3), or a "
        "parabola, which is also used where a batch is too small for loess.",
    )
    keep_protein_genes: bool = Field(
        True, title="Keep genes of measured proteins", help="Genes that encode a measured protein are always kept."
    )
    keep_genes: tuple[str, ...] = Field((), title="Genes to keep", help="Genes that are kept in any case.")
    drop_genes: tuple[str, ...] = Field((), title="Genes to leave out", help="Genes that are left out in any case.")
    genes_min_share: float = Field(
        0.01, title="Cells with a gene", tier="expert", ge=0, lt=1,
        help="Genes that are detected in no batch in more than this share of its cells cannot become variable genes.",
    )
    min_cells: int = Field(
        1, title="Cells at least", unit="cells", ge=0,
        help="Genes and peaks that are detected in fewer cells of the whole mosaic are left out.",
    )
    drop_isotype_controls: bool = Field(
        True, title="Leave out isotype controls",
        help="Isotype control antibodies measure background; they serve quality control, not the model.",
    )
    genome: Literal["auto", "hg19", "hg38", "mm10"] = Field(
        "auto", title="Genome", tier="basic",
        help="Assembly of the peaks. auto: deduced from chromosomes and peak positions; files that contradict each "
        "other are refused.",
    )
    autosomes_only: bool = Field(
        False, title="Autosomes only",
        help="Leave out peaks on sex chromosomes. Peaks on scaffolds and on the mitochondrial genome always go.",
    )
    peaks_min_share: float = Field(
        0.04, title="Cells with a peak", ge=0, lt=1,
        help="Peaks must be open in more than this share of the cells of at least one batch.",
    )
    min_peaks: int = Field(
        20_000, title="Peaks at least", unit="peaks", ge=0,
        help="In sparse data few peaks reach the share above; then the most often open peaks are kept, this many.",
    )
    max_peaks: int | None = Field(
        None, title="Peaks at most", unit="peaks", ge=1, help="Keep the most often open peaks only; empty = no limit."
    )

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """``paper``: as published for MIDAS (autosomes, a strict share); ``everything``: no feature is left out."""
        return {
            "paper": {"autosomes_only": True, "min_peaks": 0},
            "everything": {
                "n_top_genes": None, "min_cells": 0, "peaks_min_share": 0.0, "min_peaks": 0,
                "drop_isotype_controls": False,
            },
        }

    def thresholds(self, batch: str, modality: str) -> Thresholds | None:
        """The limits of a tile, its own or those of :data:`ALL_BATCHES`; ``None`` if there are none."""
        return self.qc.get(batch, {}).get(modality) or self.qc.get(ALL_BATCHES, {}).get(modality)
