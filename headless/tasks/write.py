"""Answer what a run was asked for, and write its results folder (layout: :mod:`headless.results`)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headless.data.mosaic import Mosaic
from headless.errors import MosaicError, from_os_error
from headless.models.base import Module
from headless.tasks import OUTPUTS
from headless.tasks.base import BLOCK, CANNOT, Item, having, stream
from headless.tasks.contribution import contribution, means
from headless.tasks.correct import corrected_latents, decode_blocks
from headless.tasks.embed import Latent, latent_size, pieces, posterior_names, width
from headless.tasks.impute import imputed
from headless.tasks.programs import Traversal, programs, write_programs
from headless.tasks.store import Store
from headless.tasks.translate import translated, translations


def answer(
    module: Module,
    mosaic: Mosaic,
    outputs: Sequence[str],
    folder: Path,
    emit: Callable[..., None],
    device: str = "cpu",
    *,
    keep_observed: bool = False,
    sample: bool = False,
    seed: int = 0,
    k: int = 50,
    traversal: Traversal = "corrected",
    size: int = BLOCK,
) -> None:
    """Write embeddings and the wanted layers of a trained module.

    One pass encodes every block of cells once and decodes it into imputed and translated layers; corrected layers
    and contributions follow from the stored latents. What the method cannot answer is recorded with its reason in
    ``index.json`` (``cannot``) and does not keep the rest from being written. A second call starts afresh.

    Parameters
    ----------
    outputs
        Names of :data:`headless.tasks.OUTPUTS`; the embedding is always written.
    folder
        The run's ``results`` folder; made if absent. Metrics and the model in it are left alone.
    emit
        Called as ``emit("progress", task=..., done=..., total=...)`` in cells, ``emit("artifact", path=...)`` with a
        path relative to the run folder, and ``emit("log", level=..., text=...)``.
    keep_observed
        Imputed layers hold measured counts where they exist.
    sample, seed
        Corrected layers are draws from the likelihood with this random state instead of expected values.
    k
        Neighbours for the contribution.
    traversal
        How programs are read, see :func:`headless.tasks.programs.programs`.

    Raises
    ------
    MosaicError
        ``model.unknown_output``; ``model.other_data`` if the module was not built for this mosaic; ``disk.*``.
    """
    wanted = check_outputs(outputs)
    _check_layout(module, mosaic)
    store = Store(folder)
    try:
        store.write_mosaic(mosaic)
        writer = _Writer(module, mosaic, store, emit, device, size)
        store.require(writer.layer_bytes(wanted))
        writer.embed_and_decode(wanted, keep_observed)
        if "corrected" in wanted:
            writer.correct(sample, seed)
        if "contribution" in wanted:
            writer.contribute(k, seed)
        if "programs" in wanted:
            writer.programs(traversal)
        store.index["outputs"] = {name: writer.state(name) for name in wanted}
        store.write_index()
    except OSError as error:
        raise from_os_error(error, folder, "write the results") from error
    emit("artifact", path=f"{folder.name}/index.json")


def check_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    """The wanted outputs in canonical order, the embedding included.

    Raises
    ------
    MosaicError
        ``model.unknown_output`` with the nearest name.
    """
    for name in outputs:
        if name not in OUTPUTS:
            near = difflib.get_close_matches(name, list(OUTPUTS), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Choose among: {', '.join(OUTPUTS)}."
            raise MosaicError("model.unknown_output", f"There is no output {name!r}.", hint, field="outputs")
    return tuple(name for name in OUTPUTS if name == "embedding" or name in outputs)


def _check_layout(module: Module, mosaic: Mosaic) -> None:
    known = {modality: tuple(names) for modality, names in module.layout.features.items()}
    given = {modality: tuple(map(str, mosaic.features[modality].index)) for modality in mosaic.modalities}
    for modality in given:
        if given[modality] != known.get(modality):
            raise MosaicError(
                "model.other_data",
                f"The model was trained on other {modality} features than these data have.",
                "Use the data and the preparation of the model's own run.",
                modality=modality,
            )
    if tuple(module.layout.batches) != tuple(mosaic.batches):
        raise MosaicError(
            "model.other_data",
            f"The model was trained on the batches {', '.join(module.layout.batches)}; "
            f"the data have {', '.join(mosaic.batches)}.",
            "Use the data and the preparation of the model's own run.",
        )


class _Writer:
    """The steps of :func:`answer` on one module, mosaic and store."""

    def __init__(
        self, module: Module, mosaic: Mosaic, store: Store, emit: Callable[..., None], device: str, size: int
    ) -> None:
        self.module = module
        self.mosaic = mosaic
        self.store = store
        self.emit = emit
        self.device = device
        self.size = size
        self.modalities = mosaic.modalities
        self.parts = pieces(module.parts, latent_size(module))
        self.measured = {modality: mosaic.measured(modality) for modality in self.modalities}

    def layer_bytes(self, wanted: Sequence[str]) -> int:
        """Bytes of all wanted layers before compression."""
        width = {modality: len(self.mosaic.features[modality]) for modality in self.modalities}
        whole = self.mosaic.n_cells * sum(width.values())
        total = whole * (("imputed" in wanted) + ("corrected" in wanted))
        if "translated" in wanted:
            for inputs, target in translations(self.modalities).values():
                total += int(self._having(inputs).sum()) * width[target]
        return 4 * total

    def embed_and_decode(self, wanted: Sequence[str], keep_observed: bool) -> None:
        items = self._latents()
        if "imputed" in wanted:
            items += [imputed(m, self.store.layer(f"imputed/{m}", m), keep_observed) for m in self.modalities]
        if "translated" in wanted:
            items += self._translations()
        refused = stream(
            self.module, self.mosaic, items, self.device, size=self.size, progress=self._progress("embed and decode")
        )
        for name, reason in refused.items():
            self._refuse(name, reason)
        self.store.close_latents()
        self.store.index["parts"] = {n: [p.start or 0, p.stop] for n, p in self.module.parts.items()}
        self.store.index["biological"] = self.module.biological
        self._announce("latents", *self.store.index["layers"])

    def _latents(self) -> list[Item]:
        items: list[Item] = []
        d = latent_size(self.module)
        for name, subset in posterior_names(self.modalities).items():
            if not self._having(subset).any():
                self._refuse(f"latents/{name}", _nobody(subset))
                continue
            sinks = {part: self.store.latent(name, part, width(where, d)) for part, where in self.parts.items()}
            items.append(Latent(name, subset, self.parts, sinks))
        return items

    def _translations(self) -> list[Item]:
        items: list[Item] = []
        for name, (inputs, target) in translations(self.modalities).items():
            layer = f"translated/{name}"
            if not self._having(inputs).any():
                self._refuse(layer, _nobody(inputs))
                continue
            sink = self.store.layer(layer, target, inputs=list(inputs))
            items.append(translated(name, inputs, target, sink))
        if len(self.modalities) < 2:
            self._refuse("translated", "There is only one modality.")
        return items

    def correct(self, sample: bool, seed: int) -> None:
        joint = self._joint()
        try:
            if joint is None:
                raise MosaicError(CANNOT, "The method gives no joint embedding.")
            latents, codes = corrected_latents(self.module, joint, self.mosaic.batch_codes, self.device)
        except MosaicError as error:
            if error.code != CANNOT:
                raise
            self._refuse("corrected", error.message)
            return
        for modality in self.modalities:
            self._correct(modality, latents, codes, sample, seed)

    def _correct(
        self, modality: str, latents: NDArray[np.float32], codes: NDArray[np.int64], sample: bool, seed: int
    ) -> None:
        name = f"corrected/{modality}"
        sink = self.store.layer(name, modality, sample=sample, seed=seed if sample else None)
        progress = self._progress(f"correct {modality}")
        try:
            for rows, values in decode_blocks(
                self.module, latents, codes, modality, self.device, size=self.size, sample=sample, seed=seed,
                mosaic=self.mosaic,
            ):
                sink[rows] = values
                progress(rows.stop, len(latents))
        except MosaicError as error:
            if error.code != CANNOT:
                raise
            self._refuse(name, error.message)
            return
        self._announce(name)

    def contribute(self, k: int, seed: int) -> None:
        part = f".{self.module.biological}"
        stored = [m for m in self.modalities if m in self.store.index["latents"]]
        if "joint" not in self.store.index["latents"] or len(stored) < 2:
            self._refuse("contribution", "It needs the joint embedding and those of two modalities alone.")
            return
        if not (np.sum([self.measured[m] for m in stored], axis=0) > 1).any():
            self._refuse("contribution", "No cell has two modalities.")
            return
        unimodal = {m: self._load(m + part) for m in stored}
        values = contribution(self._load("joint" + part), unimodal, k, seed)
        np.save(self.store.folder / "contribution.npy", values, allow_pickle=False)
        table = means(values, tuple(stored), self.mosaic.cells)
        table.to_csv(self.store.folder / "contribution_means.csv", index=False, lineterminator="\n")
        self.store.index["contribution"] = {"modalities": stored, "k": k}
        self._announce("contribution.npy", "contribution_means.csv")

    def programs(self, kind: Traversal) -> None:
        try:
            found = programs(self.module, kind=kind, device=self.device)
        except MosaicError as error:
            if error.code != CANNOT:
                raise
            self._refuse("programs", error.message)
            return
        self._announce(*write_programs(found, self.store))

    def state(self, output: str) -> dict[str, str]:
        """What became of an output: ``done``, or ``cannot`` with the reason."""
        made = {
            "embedding": bool(self.store.index["latents"]),
            "contribution": "contribution" in self.store.index,
            "programs": "programs" in self.store.index,
        }
        done = made.get(output, any(name.startswith(f"{output}/") for name in self.store.index["layers"]))
        if done:
            return {"state": "done"}
        prefix = "latents" if output == "embedding" else output
        reasons = [why for name, why in self.store.index["cannot"].items() if name.split("/")[0] == prefix]
        return {"state": "cannot", "reason": " ".join(dict.fromkeys(reasons))}

    def _joint(self) -> NDArray[np.float32] | None:
        """The joint latents ``(n_cells, d)``, put together from their parts."""
        if "joint" not in self.store.index["latents"]:
            return None
        if "" in self.parts:
            return self._load("joint")
        joint = np.empty((self.mosaic.n_cells, latent_size(self.module)), dtype=np.float32)
        for name, part in self.parts.items():
            joint[:, part] = self._load(f"joint.{name}")
        return joint

    def _load(self, name: str) -> NDArray[np.float32]:
        path = self.store.folder / "latents" / f"{name}.npy"
        array: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array

    def _having(self, subset: tuple[str, ...]) -> NDArray[np.bool_]:
        return having(self.measured, subset)

    def _refuse(self, name: str, reason: str) -> None:
        self.store.drop(name, reason)
        self.emit("log", level="warning", text=f"No {name.replace('/', ' ')}: {reason}")

    def _progress(self, task: str) -> Callable[[int, int], None]:
        return lambda done, total: self.emit("progress", task=task, done=done, total=total)

    def _announce(self, *names: str) -> None:
        stored = self.store.index["layers"]
        for name in names:
            path: Any = f"layers.zarr/{name}" if name in stored else name
            self.emit("artifact", path=f"{self.store.folder.name}/{path}")


def _nobody(subset: tuple[str, ...]) -> str:
    return f"No cell has {' and '.join(subset)}." if subset else "No cell has any modality."
