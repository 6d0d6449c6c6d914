"""The table of methods. Importing it imports no torch: a method's network is loaded when it is created."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from headless.errors import MosaicError
from headless.models.config import ModelConfig

if TYPE_CHECKING:
    from headless.data.mosaic import Layout
    from headless.models.base import Module

#: Entry-point group in which third parties register a ``Method``.
GROUP = "mosaic.models"


@dataclass(frozen=True)
class Method:
    """One row of the table.

    ``config_path`` and ``module_path`` are ``package.module:Class``; they are imported when asked for.
    """

    name: str
    title: str
    purpose: str
    citation: str
    config_path: str
    module_path: str

    @property
    def config(self) -> type[ModelConfig]:
        """The class of the method's settings (torch-free)."""
        found = _load(self.config_path)
        assert issubclass(found, ModelConfig)
        return found

    def load(self) -> type[Module]:
        """The class of the network; imports torch."""
        found: type[Module] = _load(self.module_path)
        return found


def _load(path: str) -> type:
    module, name = path.split(":")
    found: type = getattr(import_module(module), name)
    return found


_OWN = (
    Method(
        "midas",
        "MIDAS",
        "Mosaic integration of RNA, protein and ATAC; imputation and batch correction",
        "He et al., Mosaic integration and knowledge transfer of single-cell multimodal data with MIDAS, "
        "Nature Biotechnology (2024)",
        "headless.models.midas.config:MidasConfig",
        "headless.models.midas.module:Midas",
    ),
    Method(
        "multigrate",
        "Multigrate",
        "Paired and partly paired data; a reference onto which new batches are mapped",
        "Lotfollahi, Litinetskaya and Theis, Multigrate: single-cell multi-omic data integration, bioRxiv (2022), "
        "2022.03.16.484643",
        "headless.models.multigrate.config:MultigrateConfig",
        "headless.models.multigrate.module:Multigrate",
    ),
    Method(
        "scmm",
        "scMM",
        "Paired modalities, each generated from the other, and programs of features that a person can read",
        "Minoura et al., A mixture-of-experts deep generative model for integrated analysis of single-cell multiomics "
        "data, Cell Reports Methods (2021)",
        "headless.models.scmm.config:ScmmConfig",
        "headless.models.scmm.module:Scmm",
    ),
    Method(
        "scvaeit",
        "scVAEIT",
        "Mosaic data with gaps: imputation of features and modalities that some cells lack",
        "Du, Cai and Roeder, Robust probabilistic modeling for single-cell multimodal mosaic integration and "
        "imputation via scVAEIT, PNAS (2022)",
        "headless.models.scvaeit.config:ScVaeitConfig",
        "headless.models.scvaeit.module:ScVaeit",
    ),
)


@cache
def _table() -> tuple[dict[str, Method], dict[str, str]]:
    """Methods by name, and for plug-ins that are broken the reason."""
    methods = {method.name: method for method in _OWN}
    broken: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            method = point.load()
            if not isinstance(method, Method):
                raise TypeError(f"{point.value} is not a headless.models.Method")
            if method.name in methods:
                raise ValueError(f"the name {method.name!r} is taken")
            method.config  # noqa: B018 - a plug-in whose settings cannot be imported is broken
            methods[method.name] = method
        except Exception as error:
            # A broken plug-in is one greyed row with its reason, never a failed start.
            broken[point.name] = f"{type(error).__name__}: {error}"
    return methods, broken


def names() -> tuple[str, ...]:
    """Names of the methods that can be used."""
    return tuple(_table()[0])


def broken() -> dict[str, str]:
    """Plug-ins that could not be loaded, with the reason."""
    return dict(_table()[1])


def get(name: str) -> Method:
    """The method of that name.

    Raises
    ------
    MosaicError
        ``model.unknown``, with the nearest name.
    """
    methods, faults = _table()
    if name in methods:
        return methods[name]
    if name in faults:
        raise MosaicError("model.unknown", f"The plug-in {name!r} is broken: {faults[name]}.", "Update or remove it.")
    near = difflib.get_close_matches(name, methods, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known methods: {', '.join(methods)}."
    raise MosaicError("model.unknown", f"There is no method {name!r}.", hint, field="model")


def page(name: str) -> str:
    """The page on a method for people who use it (Markdown); empty for a plug-in that ships none."""
    from headless import resources

    get(name)
    try:
        return resources.path("help", "methods", f"{name}.md").read_text(encoding="utf-8")
    except MosaicError:
        return ""


def create(name: str, config: ModelConfig, layout: Layout) -> Module:
    """A new network of the method for data of this layout."""
    return get(name).load()(config, layout)
