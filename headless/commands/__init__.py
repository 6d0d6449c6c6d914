"""The commands of ``mosaic-headless``, one file a command or small family.

Each module has ``add(commands)``, which describes the command to argparse, and the function that carries it out. What
is heavy is imported when a command runs, so that ``--help`` is quick.
"""
