"""What the README says is what the program does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from headless import demo
from headless.errors import EXIT_CODES


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The arguments of every ``mosaic-headless`` line of a text's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("mosaic-headless ")]
    return [shlex.split(line)[1:] for line in lines]


def test_exit_codes_are_those_of_the_program(readme: str) -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", readme, flags=re.MULTILINE)
    assert {family: int(code) for code, family in rows} == EXIT_CODES


def test_links_and_pictures_exist(readme: str, repository: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", readme)
    local = [target for target in targets if "://" not in target]
    assert local
    assert not [target for target in local if not (repository / target).exists()]


def test_the_walk_through_is_the_demo(readme: str) -> None:
    # The demo names the files that the sample has made; the README lets the shell do that.
    shown = [shlex.join(command).replace("'study/files/*.h5mu'", "").replace("  ", " ") for command in commands(readme)]
    assert shown == [shlex.join(step) for step in demo.steps(Path("study"))]


def test_the_demo_stops_at_the_first_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def fail_at_new(arguments: list[str]) -> int:
        seen.append(arguments[0])
        return 3 if arguments[0] == "new" else 0

    monkeypatch.setattr("headless.cli.main", fail_at_new)
    assert demo.main(["--to", str(tmp_path / "demo")]) == 3
    assert seen == ["samples", "new"]
    assert "exit code 3" in capsys.readouterr().err


def test_the_demo_never_writes_into_a_used_folder(tmp_path: Path) -> None:
    assert demo.free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert demo.free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo" / "mine.txt").touch()
    (tmp_path / "demo-2").touch()
    assert demo.free(tmp_path / "demo") == tmp_path / "demo-3"
