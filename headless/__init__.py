"""Mosaic Desktop's engine: single-cell mosaic integration without a window.

The names below are the public interface. They are imported when they are first used, so that ``import headless``
stays quick and loads neither torch nor scanpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Public name -> (module, name there).
_API: dict[str, tuple[str, str]] = {
    "EXIT_CODES": ("headless.errors", "EXIT_CODES"),
    "MosaicError": ("headless.errors", "MosaicError"),
    "Project": ("headless.project", "Project"),
    "Experiment": ("headless.project", "Experiment"),
    "new_project": ("headless.project", "new"),
    "load_project": ("headless.project", "load"),
    "save_project": ("headless.project", "save"),
    "lock_project": ("headless.project", "lock"),
    "relink": ("headless.project", "relink"),
    "DatasetRef": ("headless.data.datasets", "DatasetRef"),
    "Preparation": ("headless.data.preparation", "Preparation"),
    "Holdout": ("headless.data.holdout", "Holdout"),
    "Pattern": ("headless.data.pattern", "Pattern"),
    "Verdict": ("headless.data.pattern", "Verdict"),
    "Mosaic": ("headless.data.mosaic", "Mosaic"),
    "peek": ("headless.data.read", "peek"),
    "read_matrix": ("headless.data.read", "read_matrix"),
    "propose": ("headless.data.propose", "propose"),
    "build_mosaic": ("headless.data.build", "build_mosaic"),
    "describe": ("headless.schema", "describe"),
    "RunFolder": ("headless.jobs.runfolder", "RunFolder"),
    "Queue": ("headless.jobs.queue", "Queue"),
    "execute": ("headless.jobs.worker", "execute"),
    "Results": ("headless.results", "Results"),
    "simulate": ("headless.data.simulate", "simulate"),
}

__all__ = ["__version__"]
__all__ += list(_API)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _API:
        module, attribute = _API[name]
        value = getattr(import_module(module), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mosaic-desktop")
    except PackageNotFoundError:  # run from a source folder that was never installed
        return "0+source"
