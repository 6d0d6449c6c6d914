"""``check``: will the experiments run? Files, mosaic, settings, methods, before anything is trained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headless.commands.common import (
    Commands,
    command,
    json_argument,
    mosaic_map,
    names_list,
    note,
    print_json,
    project_argument,
    say,
)
from headless.errors import MosaicError

if TYPE_CHECKING:
    from headless.data.mosaic import Mosaic
    from headless.project import Experiment, Project


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "check",
        run,
        "look at data and experiments before a run",
        "See whether the files are there and unchanged, build the mosaic as a run would, and ask every experiment's\n"
        "method whether it can train on it. Nothing is written, except with --relink, which records where moved data\n"
        "are now. The exit code is that of the first fault.",
        """mosaic-headless check study.mosaic
        mosaic-headless check study.mosaic --only first --json
        mosaic-headless check study.mosaic --relink /data/new_place
        mosaic-headless check study.mosaic --relink a=/data/a.h5mu""",
    )
    project_argument(parser)
    parser.add_argument("--only", action="append", metavar="NAMES", help="experiments to look at (default: all)")
    parser.add_argument(
        "--relink",
        action="append",
        default=[],
        metavar="FOLDER or ID=FILE",
        help="where moved data are now; found by their content",
    )
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Check, and say what was found."""
    from headless import project as projects
    from headless.data.build import build_mosaic
    from headless.data.locate import resolve

    if args.relink:
        _relink(args.project, args.relink)
    project = projects.load(args.project, note=note)
    only = names_list(args.only)
    experiments = [project.experiment(name) for name in only] or list(project.experiments)
    base = args.project.parent
    for ref in project.datasets:
        path = resolve(ref, base)
        if not args.json:
            say(f"{ref.id}: {path} is there and unchanged")
    if not project.datasets:
        raise MosaicError("project.no_data", "The project has no data.", "Make it with --data FILE.", field="datasets")
    mosaic = build_mosaic(project.datasets, project.preparation, base)
    pattern = mosaic.pattern()
    if not args.json:
        say("\nmosaic (cells x features, as it will be trained on):")
        say(mosaic_map(pattern))
        for text in mosaic.notes:
            say(f"  {text}")
        say()
    reports, fault = [], 0
    for experiment in experiments:
        report = _experiment(project, experiment, mosaic)
        fault = fault or report["exit_code"]
        reports.append(report)
        if not args.json:
            say(f"{experiment.name}: {report['verdict']}")
            for reason in report["reasons"]:
                say(f"  - {reason}")
    if args.json:
        print_json({"datasets": project.datasets, "pattern": pattern, "notes": mosaic.notes, "experiments": reports})
    elif not experiments:
        say(f"No experiment yet: mosaic-headless add {args.project} --model midas --name first")
    return int(fault)


def _experiment(project: Project, experiment: Experiment, mosaic: Mosaic) -> dict[str, Any]:
    from headless import models
    from headless.data.holdout import choose
    from headless.jobs.runfolder import request_of

    try:
        request = request_of(project, experiment)
        hidden = choose(mosaic, experiment.holdout)
        verdict = models.get(experiment.model).config.supports(mosaic.without(hidden).pattern())
        _check_device(experiment.device)
    except MosaicError as error:
        reasons = [f"{error.message} {error.hint}".strip()]
        return {"name": experiment.name, "verdict": "cannot run", "reasons": reasons, **_code(error)}
    words = {"fits": "can run", "limits": "can run, with limits", "cannot": "cannot run"}[verdict.level]
    hides = [f"hidden for scoring: {modality} of {len(cells)} cells" for modality, cells in hidden.items()]
    return {
        "name": experiment.name,
        "verdict": words,
        "reasons": [*verdict.reasons, *hides],
        "settings": request.settings,
        "code": "model.unsupported" if verdict.level == "cannot" else "",
        "exit_code": 5 if verdict.level == "cannot" else 0,
    }


def _check_device(wish: str) -> None:
    if wish.startswith("cuda"):
        from headless.train import devices

        devices.resolve(wish)


def _code(error: MosaicError) -> dict[str, Any]:
    return {"code": error.code, "exit_code": error.exit_code}


def _relink(path: Path, given: list[str]) -> None:
    from headless import project as projects

    named = dict(item.split("=", 1) for item in given if "=" in item)
    folders = [item for item in given if "=" not in item]
    if folders and (named or len(folders) > 1):
        raise MosaicError("usage.relink", "Name one folder, or ID=FILE for each file.", "--relink a=/data/a.h5mu")
    with projects.lock(path):
        project = projects.load(path, note=note)
        where: Path | dict[str, Path]
        # Paths on the command line are relative to where it is typed.
        where = Path(folders[0]).absolute() if folders else {key: Path(p).absolute() for key, p in named.items()}
        projects.save(projects.relink(project, path.parent, where), path)
