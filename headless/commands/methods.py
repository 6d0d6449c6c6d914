"""``methods``: what can be trained, and what each method is for."""

from __future__ import annotations

import argparse

from headless.commands.common import Commands, command, json_argument, print_json, say, table


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "methods",
        run,
        "list the methods, or say what one is for",
        "List the methods that can be trained; with a name, say in plain words what that method is for, when\n"
        "to choose another one, and which knobs matter. 'add --list' shows all of its settings.",
        """mosaic-headless methods
        mosaic-headless methods multigrate""",
    )
    parser.add_argument("name", nargs="?", help="a method")
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """List the methods, or show the page of one."""
    from headless import models

    if args.name is not None:
        return _page(args.name, args.json)
    methods = [models.get(name) for name in models.names()]
    faults = models.broken()
    if args.json:
        rows = [{"name": m.name, "title": m.title, "purpose": m.purpose, "citation": m.citation} for m in methods]
        print_json({"methods": rows, "broken": faults})
        return 0
    say(table([[m.name, m.title, m.purpose] for m in methods], ["name", "", "for"]))
    for name, reason in faults.items():
        say(f"  {name}: cannot be used ({reason})")
    say("'mosaic-headless methods NAME' says more.")
    return 0


def _page(name: str, as_json: bool) -> int:
    from headless import models

    method = models.get(name)
    text = models.page(name)
    if as_json:
        print_json({"name": name, "title": method.title, "citation": method.citation, "page": text})
    else:
        say(text or f"{method.title}: {method.purpose}\n\nCite: {method.citation}")
    return 0
