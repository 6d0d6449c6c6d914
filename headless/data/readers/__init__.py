"""Readers of one family of formats each; :mod:`headless.data.read` chooses among them."""
