"""Scores as text or CSV: the model and its baselines side by side."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any, Final

from headless.evaluate.scib import BATCH_PART, BIO_PART, FLAVOUR

#: Order and words of the columns; metrics that are not named here stay in the JSON only.
INTEGRATION: Final = {
    "overall": "overall", "bio": "bio", "batch": "batch",
    **{name: name for name in (*BIO_PART, *BATCH_PART)},
}  # fmt: skip
IMPUTATION: Final = {
    "pearson_feature": "r/feature", "spearman_feature": "rho/feature", "pearson_cell": "r/cell",
    "spearman_cell": "rho/cell", "auroc_feature": "AUROC/feature", "auprc_feature": "AUPRC/feature",
    "auroc_cell": "AUROC/cell", "auprc_cell": "AUPRC/cell", "pearson_flat": "r/all", "auroc_flat": "AUROC/all",
    "rmse_flat": "RMSE",
}  # fmt: skip
ALIGNMENT: Final = {"foscttm": "FOSCTTM", "label_transfer": "label transfer"}

Scores = Mapping[str, Any]
Row = tuple[str, str, Mapping[str, Any]]  # section, name, metrics


def rows(scores: Scores) -> Iterator[tuple[str, dict[str, str], list[Row]]]:
    """Sections (title, columns, rows) of what :func:`headless.evaluate.score_run` returned, the model's row first."""
    beside = scores["baselines"]
    integration = [("integration", name, row) for name, row in {**scores["scib"], **beside["scib"]}.items()]
    if integration:
        yield f"Integration ({FLAVOUR}; 1 is best)", INTEGRATION, integration
    aligned = [("alignment", pair, row) for pair, row in scores["alignment"].items()]
    if aligned:
        yield "Alignment of modalities (FOSCTTM: 0 is best, 0.5 is random)", ALIGNMENT, aligned
    for modality, model in scores["imputation"].items():
        all_rows = {**model, **beside["imputation"].get(modality, {})}
        yield (
            f"Hidden {modality} against the truth (medians over features or cells; RMSE: 0 is best)",
            IMPUTATION,
            [(f"imputation of {modality}", name, row) for name, row in all_rows.items()],
        )


def text(scores: Scores) -> str:
    """Tables for a console, with the reasons for what is absent below them."""
    blocks = []
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for title, columns, section in rows(scores):
        used = {key: word for key, word in columns.items() if any(key in metrics for _, _, metrics in section)}
        lines = [["", *used.values()]]
        for part, name, metrics in section:
            lines.append([name, *(_shown(metrics.get(key)) for key in used)])
            for key, metric in metrics.items():
                if metric["value"] is None:
                    reasons.setdefault((part, name, metric["reason"]), []).append(key)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
        blocks.append("\n".join([title, *body]))
    absent = [f"  {name}: {reason}" for name, reason in scores["absent"].items()]
    absent += [f"  {part}, {name}: {', '.join(keys)}: {why}" for (part, name, why), keys in reasons.items()]
    if absent:
        blocks.append("\n".join(["Not available", *absent]))
    return "\n\n".join(blocks) + "\n"


def as_csv(scores: Scores) -> str:
    """One line a metric: part, row, metric, value (empty if absent), reason."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["part", "row", "metric", "value", "reason"])
    for _, _, section in rows(scores):
        for part, name, metrics in section:
            for key, metric in metrics.items():
                value = metric["value"]
                writer.writerow([part, name, key, "" if value is None else repr(float(value)), metric["reason"]])
    return out.getvalue()


def _shown(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "-"
    return f"{metric['value']:.3f}"
