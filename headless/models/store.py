"""A trained model on disk: safetensors weights and a JSON page that says what they are. No pickle.

The page holds the method, its settings and the layout (features, batches, chromosomes), so that a model loads without
the project it came from and refuses data that differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from headless.data.mosaic import Layout
from headless.errors import MosaicError, from_os_error
from headless.models import create, get
from headless.models.base import Module

FORMAT = 1


def save_model(folder: Path, module: Module, method: str, extra: Mapping[str, Any] | None = None) -> None:
    """Write ``weights.safetensors`` and ``model.json``; ``extra`` is JSON-ready provenance.

    Raises
    ------
    MosaicError
        ``disk.full``, ``disk.read_only``.
    """
    folder = Path(folder)
    page = {
        "format": FORMAT,
        "method": method,
        "config": module.config.model_dump(mode="json"),
        "layout": module.layout.as_dict(),
        "state": module.extra_state(),
        "extra": dict(extra or {}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        save_file(weights, folder / "weights.safetensors.part")
        (folder / "model.json.part").write_text(json.dumps(page), encoding="utf-8")
        # The page goes last: a folder with a page is whole.
        (folder / "weights.safetensors.part").replace(folder / "weights.safetensors")
        (folder / "model.json.part").replace(folder / "model.json")
    except OSError as error:
        raise from_os_error(error, folder, "save the model") from error
    except SafetensorError as error:
        raise MosaicError("disk.failed", f"Could not save the model: {error}.", file=folder) from error


def load_model(folder: Path, device: str = "cpu") -> Module:
    """The module in evaluation mode.

    Raises
    ------
    MosaicError
        ``run.no_result`` if there is no model, ``run.damaged`` if it cannot be read, ``model.newer`` if it was
        written by a newer program, ``model.unknown`` if its method is not installed.
    """
    folder = Path(folder)
    if not (folder / "model.json").exists():
        raise MosaicError("run.no_result", "There is no trained model here.", "Let the run finish first.", file=folder)
    try:
        page = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        version = int(page["format"])
        method, settings, layout = page["method"], page["config"], Layout.from_dict(page["layout"])
        state = page["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    if version > FORMAT:
        raise MosaicError(
            "model.newer", "The model was saved by a newer version of this program.", "Update the program.", file=folder
        )
    module = create(method, get(method).config.make(None, **settings), layout)
    try:
        module.load_state_dict(load_file(folder / "weights.safetensors", device="cpu"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _damaged(folder, error) from error
    module.load_extra_state(state)
    return module.to(device).train(False)


def _damaged(folder: Path, error: Exception) -> MosaicError:
    return MosaicError(
        "run.damaged",
        f"The saved model cannot be read: {str(error).splitlines()[0][:200]}.",
        "Run the experiment again, or restore the folder from a backup.",
        file=folder,
    )
