"""Scores of a result: integration (scIB), alignment (FOSCTTM), imputation, and the baselines beside them."""

from headless.evaluate.run_scores import score_run

__all__ = ["score_run"]
