"""``add``: an experiment for a project."""

from __future__ import annotations

import argparse
from typing import Any

from headless.commands.common import (
    Commands,
    assignments,
    command,
    json_argument,
    names_list,
    note,
    print_json,
    project_argument,
    say,
)
from headless.errors import MosaicError


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "add",
        run,
        "add an experiment: a method, its settings, what is wanted",
        "Add an experiment to a project. Settings are checked at once; those that are not named keep the values\n"
        "of the preset. --list shows the settings of a method.",
        """mosaic-headless add study.mosaic --model midas --name first
        mosaic-headless add study.mosaic --model midas --name quick --preset fast --seed 1 --set max_epochs=50
        mosaic-headless add study.mosaic --name scored --holdout 0.1 --outputs embedding,imputed
        mosaic-headless add study.mosaic --model midas --list""",
    )
    project_argument(parser)
    parser.add_argument("--model", default="midas", help="the method (default: midas)")
    parser.add_argument("--name", help="name of the experiment (default: that of the method)")
    parser.add_argument("--preset", help="named settings of the method")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        dest="settings",
        help="a setting that differs from the preset; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="state of every random choice (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the cells with several modalities in which one is hidden from training, "
        "to score imputation with (default: 0)",
    )
    parser.add_argument(
        "--holdout-modalities", action="append", metavar="NAMES", help="modalities that are hidden (default: all)"
    )
    parser.add_argument(
        "--outputs",
        action="append",
        metavar="NAMES",
        help="embedding, imputed, corrected, translated, contribution, programs (default: the first three)",
    )
    parser.add_argument("--notes", default="", help="free text")
    parser.add_argument("--list", action="store_true", help="show the settings and presets of the method and end")
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Add the experiment."""
    from pydantic import ValidationError

    from headless import models
    from headless import project as projects
    from headless.data.holdout import Holdout
    from headless.schema import from_validation

    method = models.get(args.model)
    if args.list:
        return _list(method, args.json)
    settings = assignments(args.settings, "--set")
    config = method.config.make(args.preset, **settings)
    try:
        experiment = projects.Experiment(
            name=args.name or args.model,
            model=args.model,
            preset=args.preset,
            settings={name: config.model_dump(mode="json")[name] for name in settings},
            seed=args.seed,
            device=args.device,
            holdout=Holdout(fraction=args.holdout, modalities=names_list(args.holdout_modalities), seed=args.seed),
            outputs=_outputs(names_list(args.outputs)),
            notes=args.notes,
        )
    except ValidationError as error:
        raise from_validation(error, "usage.experiment") from None
    with projects.lock(args.project):
        project = projects.load(args.project, note=note)
        projects.save(project.with_experiment(experiment), args.project)
    if args.json:
        print_json({"project": args.project, "experiment": experiment, "settings": config})
    else:
        changed = ", ".join(f"{name} = {value}" for name, value in experiment.settings.items())
        say(
            f"{experiment.name}: {method.title}, {experiment.preset or 'default'} settings"
            + (f", {changed}" if changed else "")
        )
        say(f"Next: mosaic-headless check {args.project}; mosaic-headless run {args.project}")
    return 0


def _outputs(names: tuple[str, ...]) -> tuple[Any, ...]:
    from headless.project import nearest
    from headless.tasks import OUTPUTS

    for name in names:
        if name not in OUTPUTS:
            raise MosaicError(
                "usage.unknown_output", f"There is no output {name!r}.", nearest(name, OUTPUTS), field="outputs"
            )
    chosen = names or ("embedding", "imputed", "corrected")
    return tuple(dict.fromkeys(("embedding", *chosen)))


def _list(method: object, as_json: bool) -> int:
    from headless.models import Method
    from headless.schema import describe

    assert isinstance(method, Method)
    rows, presets = describe(method.config), method.config.presets()
    if as_json:
        print_json({"model": method.name, "presets": presets, "settings": rows})
        return 0
    say(f"{method.title}: {method.purpose}\n{method.citation}\n")
    for tier in ("basic", "advanced", "expert"):
        say(f"{tier} settings")
        for row in rows:
            if row["tier"] == tier:
                unit = f" {row['unit']}" if row["unit"] else ""
                say(f"  {row['name']} = {row['default']}{unit}\n      {row['help']}")
    for name, values in presets.items():
        say(f"preset {name}: " + (", ".join(f"{key} = {value}" for key, value in values.items()) or "the defaults"))
    return 0
