"""``samples``: data to start with."""

from __future__ import annotations

import argparse
from pathlib import Path

from headless.commands.common import Commands, command, json_argument, note, print_json, say, table


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "samples",
        show,
        "list, make or fetch data to start with",
        "List the samples, make the simulated one, or fetch a public one (checked against its checksum).",
        """mosaic-headless samples
        mosaic-headless samples make blood --to demo
        mosaic-headless samples get NAME --to data""",
    )
    json_argument(parser)
    parser.set_defaults(json=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listed = actions.add_parser("list", help="list the samples (the default)")
    json_argument(listed)
    listed.set_defaults(call=show)
    for name, summary in (
        ("make", "make a simulated sample"),
        ("get", "fetch a public sample, or make a simulated one"),
    ):
        action = actions.add_parser(name, help=summary)
        action.add_argument("name", help="name of the sample")
        action.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder for its files")
        json_argument(action)
        action.set_defaults(call=fetch)


def show(args: argparse.Namespace) -> int:
    """List the samples."""
    from headless.data import samples

    rows = samples.table()
    if args.json:
        print_json({"samples": rows})
        return 0
    shown = [[row.name, row.kind, ", ".join(row.modalities), row.size, row.licence, row.title] for row in rows]
    say(table(shown, ["name", "", "modalities", "size", "licence", "what it is"]))
    return 0


def fetch(args: argparse.Namespace) -> int:
    """Make or fetch a sample."""
    from headless.data import samples

    sample = samples.get(args.name)
    paths = samples.fetch(sample, args.to, note=note)
    if args.json:
        print_json({"sample": sample.name, "files": paths})
        return 0
    for path in paths:
        say(str(path))
    study = args.to / f"{sample.name}.mosaic"
    say(f"Next: mosaic-headless new {study} --data {' '.join(map(str, paths))}")
    return 0
