"""The window of Mosaic Desktop.

Not part of this version: everything there is so far is done by ``mosaic-headless``. The package stands here so that
the import rules hold from its first line on.
"""
