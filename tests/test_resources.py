"""Resources are found in a checkout and in an installed wheel, and their absence is said in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headless import resources
from headless.errors import MosaicError


def test_a_checkout_uses_its_own_folder(repository: Path) -> None:
    found = resources.path("help", "overview.png")
    assert str(found) == str(repository / "resources" / "help" / "overview.png")
    assert found.read_bytes().startswith(b"\x89PNG")


def test_a_missing_resource_is_named() -> None:
    with pytest.raises(MosaicError, match=r"help/nothing\.txt") as raised:
        resources.path("help", "nothing.txt")
    assert raised.value.code == "internal.missing_resource"


def run_installed(site: Path, statement: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", statement], cwd=site, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, timeout=120, check=False,
    )


def test_an_installed_wheel_uses_the_folder_inside_the_package(tmp_path: Path, repository: Path) -> None:
    package = tmp_path / "headless"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("errors.py", "resources.py"):
        shutil.copy(repository / "headless" / name, package)
    statement = "from headless import resources; print(resources.path('help', 'note.txt').read_text(encoding='utf-8'))"

    incomplete = run_installed(tmp_path, statement)
    assert incomplete.returncode
    assert "missing" in incomplete.stderr

    (package / "_resources" / "help").mkdir(parents=True)
    (package / "_resources" / "help" / "note.txt").write_text("found", encoding="utf-8")
    assert run_installed(tmp_path, statement).stdout.strip() == "found"
