"""Multigrate (Lotfollahi, Litinetskaya and Theis, bioRxiv 2022)."""
