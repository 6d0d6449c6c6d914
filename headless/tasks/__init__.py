"""Tasks: embed, impute, translate, correct, contribution, programs. Each is written once, against the model contract.

No torch here: the project's checks and the window read :data:`OUTPUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from headless.data.mosaic import Mosaic
    from headless.models.base import Module

#: What a run can be asked for, with the words that a form shows. ``embedding`` is always made.
OUTPUTS: Final[dict[str, str]] = {
    "embedding": "Joint embedding, and one from each modality alone",
    "imputed": "Expected values of every modality for every cell",
    "corrected": "Expected values with the technical differences between batches taken out",
    "translated": "Every modality predicted from every set of other modalities",
    "contribution": "How much each modality contributes to the joint embedding of a cell",
    "programs": "What each dimension of the embedding does to every feature",
}


def answer(
    module: Module,
    mosaic: Mosaic,
    outputs: Sequence[str],
    folder: Path,
    emit: Callable[..., None],
    device: str = "cpu",
    **options: Any,
) -> None:
    """Write the results of a trained module; see :func:`headless.tasks.write.answer`."""
    from headless.tasks.write import answer as write_answer

    write_answer(module, mosaic, outputs, folder, emit, device, **options)
