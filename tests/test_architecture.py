"""The rules of the house that a test can hold: what an import brings along, and what no file may contain.

Which package may import which is checked by import-linter (``make lint``); here it is seen in a fresh interpreter.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import headless

HEAVY = {"torch", "scanpy", "anndata", "lightning_fabric", "sklearn"}
GRAPHICAL = {"qtpy", "PySide6", "PyQt6", "PyQt5", "pyqtgraph", "napari", "mosaic_desktop"}
LIGHT = [
    "headless",
    "headless.cli",
    "headless.data.datasets",
    "headless.data.pattern",
    "headless.data.preparation",
    "headless.errors",
    "headless.jobs.queue",
    "headless.models",
    "headless.models.config",
    "headless.models.midas.config",
    "headless.project",
    "headless.schema",
]
#: Folders that are not part of the program, or not made by us.
FOREIGN = {".git", ".venv", "build", "dist", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache"}


def imported_by(statement: str) -> set[str]:
    """Top-level names of all modules that a statement loads in a fresh interpreter."""
    shown = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; {shown}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def python_files(root: Path) -> Iterator[Path]:
    for folder in ("headless", "mosaic_desktop", "tests", "installer", "resources"):
        yield from sorted(path for path in (root / folder).rglob("*.py") if not FOREIGN & set(path.parts))


def text_files(root: Path) -> Iterator[tuple[Path, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = root / name
        if path.is_file() and path.stat().st_size < 2_000_000:
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


@pytest.mark.parametrize("module", LIGHT)
def test_the_window_and_the_queue_can_import_it_without_torch(module: str) -> None:
    loaded = imported_by(f"import {module}")
    assert module.partition(".")[0] in loaded
    assert not loaded & HEAVY


def test_every_method_describes_itself_without_torch() -> None:
    statement = "from headless import models; [models.get(name).config.make() for name in models.names()]"
    assert not imported_by(statement) & HEAVY


def test_every_public_name_exists() -> None:
    assert not [name for name in headless.__all__ if getattr(headless, name, None) is None]


def test_no_module_of_the_engine_imports_a_window(repository: Path) -> None:
    for path in sorted((repository / "headless").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found = {name.partition(".")[0] for name in names} & GRAPHICAL
            assert not found, f"{path.relative_to(repository)}:{node.lineno} imports {found}"


def unsafe_loads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls that would run code from a file: line and what is wrong with each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [module] if module else [alias.name for alias in node.names]
            for name in names:
                if name.partition(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}:
                    yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if given.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle"
        if called in {"joblib.load", "pd.read_pickle", "pandas.read_pickle"}:
            yield node.lineno, called


def test_no_file_of_ours_unpickles(repository: Path) -> None:
    found = [
        f"{path.relative_to(repository)}:{line} {fault}"
        for path in python_files(repository)
        for line, fault in unsafe_loads(ast.parse(path.read_text(encoding="utf-8")))
        # Tests may make a hostile file to see it refused.
        if "tests" not in path.relative_to(repository).parts
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "joblib.load(path)",
    ],
)
def test_the_search_for_unpickling_finds_it(source: str) -> None:
    assert list(unsafe_loads(ast.parse(source)))


def test_the_search_for_unpickling_leaves_safe_loads_alone() -> None:
    safe = "torch.load(path, weights_only=True); np.load(path, allow_pickle=False); json.load(file)"
    assert not list(unsafe_loads(ast.parse(safe)))


# Written so that this file does not find itself.
ROOTS = "|".join(["home", "work", "root", "farm", "Users"])
MACHINE_PATH = re.compile(rf"(?<![\w.~>$\])}}-])/(?:{ROOTS})/[a-z]\w*")


@pytest.mark.parametrize("text", ["open('/ho" "me/ann/data')", "cd /wo" "rk/main"])
def test_the_search_for_machine_paths_finds_them(text: str) -> None:
    assert MACHINE_PATH.search(text)


def test_no_file_names_a_path_of_somebodys_machine(repository: Path) -> None:
    found = [
        f"{path.relative_to(repository)}: {match.group()}"
        for path, text in text_files(repository)
        if (match := MACHINE_PATH.search(text))
    ]
    assert not found


def test_nothing_large_is_kept_in_the_repository(repository: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False)
    large = [name for name in listed.stdout.splitlines() if (repository / name).is_file()
             and (repository / name).stat().st_size > 1_000_000]
    assert not large


def test_pins_are_exact_and_cover_the_dependencies(repository: Path) -> None:
    pins = [
        line for line in (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    unpinned = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line)]
    assert not unpinned
    pinned = {normal(line.partition("==")[0]) for line in pins}
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["test"], *extras["dev"], *extras["metrics"]]
    assert not {normal(re.split(r"[\[<>=!~; ]", item, maxsplit=1)[0]) for item in needed} - pinned
    assert "torch==2.13.0" in pins


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_program_tells_the_version_of_the_distribution() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headless.cli", "--version"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert metadata.version("mosaic-desktop") in done.stdout
