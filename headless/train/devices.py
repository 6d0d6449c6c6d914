"""Which device a run trains on. A wish that cannot be met is an error: never a silent fall back to the CPU."""

from __future__ import annotations

import os
import platform
from typing import Any

from headless.errors import MosaicError


def resolve(wish: str) -> str:
    """``cpu`` or ``cuda:N`` for a wish of ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``auto`` takes a GPU where one can be used and the CPU otherwise.

    Raises
    ------
    MosaicError
        ``device.unknown``, ``device.unusable``.
    """
    import torch

    if wish == "cpu":
        return "cpu"
    if wish == "auto":
        return "cuda:0" if usable_gpus() else "cpu"
    kind, _, number = wish.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise MosaicError(
            "device.unknown", f"There is no device {wish!r}.", "Use auto, cpu, cuda or cuda:N.", field="device"
        )
    index = int(number or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no such GPU was found"
        raise MosaicError(
            "device.unusable",
            f"The run asks for {wish}, but {why}.",
            "Choose --device cpu (slower), or an engine with a GPU build of PyTorch.",
            field="device",
        )
    _probe(index)
    return f"cuda:{index}"


def usable_gpus() -> list[int]:
    """Numbers of the GPUs on which a matrix product works."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        try:
            _probe(index)
        except MosaicError:
            continue
        found.append(index)
    return found


def _probe(index: int) -> None:
    import torch

    try:
        x = torch.ones(8, 8, device=f"cuda:{index}")
        float((x @ x).sum())
    except Exception as error:
        raise MosaicError(
            "device.unusable",
            f"GPU {index} cannot compute: {str(error).splitlines()[0]}.",
            "Update the driver, or use a PyTorch build for this GPU; --device cpu works meanwhile.",
            field="device",
        ) from error


def precision_for(wish: str, device: str) -> str:
    """Fabric's precision for a configuration's wish (``auto``, ``float32``, ``bf16``)."""
    import torch

    if wish == "bf16":
        return "bf16-mixed"
    if wish == "auto" and device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed"
    return "32-true"


def describe() -> list[dict[str, Any]]:
    """The devices of this machine in words, for ``doctor``."""
    import torch

    rows: list[dict[str, Any]] = [
        {"name": "cpu", "title": platform.processor() or platform.machine(), "cores": os.cpu_count(), "usable": True}
    ]
    if torch.cuda.is_available():
        usable = usable_gpus()
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            rows.append(
                {
                    "name": f"cuda:{index}",
                    "title": torch.cuda.get_device_name(index),
                    "free_gb": round(free / 1e9, 1),
                    "total_gb": round(total / 1e9, 1),
                    "usable": index in usable,
                }
            )
    return rows
