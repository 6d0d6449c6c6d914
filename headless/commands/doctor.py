"""``doctor``: what machine this is, what works on it and what does not."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headless.commands.common import Commands, command, json_argument, print_json, say
from headless.errors import EXIT_CODES, MosaicError


def add(commands: Commands) -> None:
    """Describe the command."""
    parser = command(
        commands,
        "doctor",
        run,
        "tell what works on this machine",
        "Tell versions, devices, methods, readers, memory, disk and threads, and what is wrong with them. Paste the\n"
        "output into a bug report. The exit code is 0 unless something that every run needs is broken.",
        """mosaic-headless doctor
        mosaic-headless doctor --json""",
    )
    json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Look, and tell."""
    faults: list[str] = []
    report = {
        "system": _system(),
        "versions": _versions(faults),
        "devices": _try(_devices, faults, "devices"),
        "methods": _try(_methods, faults, "methods"),
        "readers": _try(_readers, faults, "readers"),
        "resources": _try(_resources, faults, "resources"),
        "memory": _memory(),
        "disk": _disk(Path.cwd()),
        "threads": _try(_threads, faults, "threads"),
        "faults": faults,
    }
    if args.json:
        print_json(report)
    else:
        for name, value in report.items():
            if name != "faults":
                _show(name, value)
        say("nothing wrong was found" if not faults else "wrong:\n" + "\n".join(f"  {fault}" for fault in faults))
    return EXIT_CODES["internal"] if faults else EXIT_CODES["ok"]


def _try(look: Callable[[], Any], faults: list[str], what: str) -> Any:
    try:
        return look()
    except MosaicError as error:
        faults.append(f"{what}: {error}")
    except Exception as error:  # the doctor must be able to tell of anything that is broken
        faults.append(f"{what}: {type(error).__name__}: {error}")
    return None


def _system() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "executable": sys.executable,
    }


def _versions(faults: list[str]) -> dict[str, str]:
    from headless.jobs.runfolder import versions

    found = versions()
    faults.extend(f"{name} is not installed" for name, version in found.items() if version == "missing")
    return found


def _devices() -> Any:
    from headless.train import devices

    return devices.describe()


def _methods() -> dict[str, str]:
    from headless import models

    return {
        **{name: models.get(name).title for name in models.names()},
        **{name: f"broken: {reason}" for name, reason in models.broken().items()},
    }


def _readers() -> list[str]:
    from headless.data.read import FORMATS

    return list(FORMATS)


def _resources() -> list[str]:
    from headless.resources import path

    return sorted(item.name for item in path().iterdir())


def _memory() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": _gigabytes(memory.total), "available": _gigabytes(memory.available)}


def _disk(folder: Path) -> dict[str, str]:
    usage = shutil.disk_usage(folder)
    return {"folder": str(folder), "free": _gigabytes(usage.free), "writable": "yes" if _writable(folder) else "no"}


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)


def _threads() -> dict[str, Any]:
    from headless.jobs.worker import thread_count

    return {"used by a run": thread_count(), "logical processors": os.cpu_count()}


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _show(name: str, value: Any) -> None:
    if isinstance(value, dict):
        say(name)
        for key, item in value.items():
            say(f"  {key}: {item}")
    elif isinstance(value, list):
        say(name)
        for item in value:
            say("  " + (", ".join(f"{k} {v}" for k, v in item.items()) if isinstance(item, dict) else str(item)))
    else:
        say(f"{name}: {'unknown' if value is None else value}")
