"""Start workers as processes of their own, which neither the end of the starter nor its Ctrl-C reaches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headless.errors import MosaicError
from headless.jobs.runfolder import RunFolder

#: Variables of the starter that would mislead a worker: interactive Python, Qt and bundled libraries.
_DROPPED = ("PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONHOME", "PYTHONEXECUTABLE", "VIRTUAL_ENV_PROMPT")
_DROPPED_PREFIXES = ("QT_", "QML_", "PYSIDE_", "PYQTGRAPH_", "_PYI_", "_MEIPASS")


def engine() -> list[str]:
    """The command that understands ``worker RUN``: this interpreter."""
    return [sys.executable, "-m", "headless"]


def launch(run: RunFolder, command: Sequence[str] | None = None) -> subprocess.Popen[bytes]:
    """Start a worker on a run folder; its unexpected output goes to the run's log.

    ``command`` is another engine (see :func:`engine`).

    Raises
    ------
    MosaicError
        ``run.not_started`` when the program cannot be started.
    """
    if os.name == "nt":
        apart: dict[str, Any] = {
            "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
            | getattr(subprocess, "CREATE_NO_WINDOW", 0)
        }
    else:
        apart = {"start_new_session": True}
    try:
        with open(run.log_path, "ab") as log:
            return subprocess.Popen(
                [*(command or engine()), "worker", os.path.abspath(run.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=run.path,
                env=environment(),
                close_fds=True,
                **apart,
            )
    except OSError as error:
        raise MosaicError(
            "run.not_started", f"The worker could not be started: {error.strerror or error}.", run=run.id
        ) from error


def environment() -> dict[str, str]:
    """The environment of a worker."""
    values = {
        key: value for key, value in os.environ.items() if key not in _DROPPED and not key.startswith(_DROPPED_PREFIXES)
    }
    values.update(PYTHONUNBUFFERED="1", PYTHONSAFEPATH="1", MPLBACKEND="Agg")
    home = Path(__file__).resolve().parents[2]
    if home.name not in ("site-packages", "dist-packages"):
        # Run from a source folder: the worker must find the same code, wherever it is started.
        values["PYTHONPATH"] = os.pathsep.join(filter(None, (str(home), values.get("PYTHONPATH", ""))))
    return values
