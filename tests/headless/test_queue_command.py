"""``mosaic-headless queue``: what it prints, what it changes, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headless import cli
from headless import project as projects
from headless.errors import EXIT_CODES, MosaicError
from headless.jobs.queue import Queue
from headless.jobs.runfolder import RunFolder, State, find_run, list_runs
from headless.project import Experiment

Sh = Callable[..., int]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.mosaic"
    projects.new(path)
    project = projects.load(path)
    for name in ("first", "first", "second"):
        RunFolder.create(path, project, Experiment(name=name))
    return path


class Shell:
    def __init__(self, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.study, self._capsys = study, capsys
        self.out = self.err = ""

    def __call__(self, action: str, *words: object) -> int:
        code = cli.main(["queue", action, str(self.study), *map(str, words)])
        self.out, self.err = self._capsys.readouterr()
        return code

    def listed(self) -> dict[str, Any]:
        assert self("list", "--json") == 0
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def sh(study: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(study, capsys)


def waiting(study: Path) -> tuple[str, ...]:
    with Queue(study) as queue:
        return queue.state.waiting


def test_order_holds_and_dependencies(sh: Shell) -> None:
    assert sh("add", "first-1", "first-2", "second") == 0
    assert waiting(sh.study) == ("first-1", "first-2", "second-1")
    assert sh("move", "second", "--to", 1) == 0
    assert sh("move", "first-1", "--to", -1) == 0
    assert waiting(sh.study) == ("second-1", "first-2", "first-1")
    assert sh("hold", "second-1") == 0
    assert sh("after", "first-1", "second-1", "first-2") == 0
    found = sh.listed()
    assert [(row["place"], row["run"]) for row in found["runs"]] == [(1, "second-1"), (2, "first-2"), (3, "first-1")]
    assert [row["waits"] for row in found["runs"]] == ["held", "", "after second-1, which is not started (held)"]
    assert found["runs"][2]["after"] == ["second-1", "first-2"]
    assert sh("list") == 0
    assert "after second-1, which is not started (held)" in sh.out
    assert sh("release", "second-1") == 0
    assert sh("after", "first-1") == 0
    assert {row["waits"] for row in sh.listed()["runs"]} == {""}


def test_switches(sh: Shell) -> None:
    assert sh("pause") == 0
    assert sh("on-error", "stop") == 0
    found = sh.listed()
    assert (found["paused"], found["on_error"]) == (True, "stop")
    assert sh("list") == 0
    assert "The queue is paused" in sh.out
    assert sh("resume") == 0
    assert "mosaic-headless resume" in sh.out
    assert sh.listed()["paused"] is False


def test_trash(sh: Shell) -> None:
    sh("add", "first-1", "first-2")
    assert sh("remove", "first-1") == 0
    assert sh.listed()["trash"] == ["first-1"]
    assert sh("undo") == 0
    assert waiting(sh.study) == ("first-1", "first-2")
    assert sh("undo", "first-1") == 0  # it is back already
    assert sh("remove", "first-1", "first-2") == 0
    assert sh("empty") == 0
    assert "2 runs" in sh.out
    assert sh("undo") == EXIT_CODES["usage"]
    assert [run.id for run in list_runs(sh.study)] == ["second-1"]


def test_retries_and_duplicates(sh: Shell) -> None:
    run = find_run(sh.study, "second")
    error = MosaicError("diverged.loss", "no number", phase="train").as_dict()
    run.write_state(State(status="failed", updated="", attempts=1, error=error))
    assert sh("retry", "second") == 0
    assert sh("retry", "second-1", "--set", "lr=0.5", "--json") == 0
    assert json.loads(sh.out)["run"] == "second-2"
    assert sh("retry", "second-1", "--advised") == 0
    assert "diverged: rate" in sh.out
    assert sh("duplicate", "second-1", "--set", "seed=9") == 0
    assert find_run(sh.study, "second").request.seed == 9
    assert waiting(sh.study) == ("second-1", "second-2", "second-3", "second-4")
    assert sh("retry", "second-2", "--advised") == EXIT_CODES["run"]  # it has not failed


@pytest.mark.parametrize(
    ("words", "family"),
    [
        (("hold", "first-1"), "run"),  # does not wait
        (("hold", "frist"), "usage"),
        (("move", "first-1", "--to", "0"), "usage"),
        (("duplicate", "first-1", "--set", "lrr=1"), "model"),
        (("retry", "first-1", "--set", "lr=1", "--advised"), "usage"),
        (("on-error", "never"), "usage"),
        (("dance",), "usage"),
    ],
)
def test_what_makes_no_sense_is_refused(sh: Shell, words: tuple[str, ...], family: str) -> None:
    assert sh(*words) == EXIT_CODES[family]
    assert "error [" in sh.err
    assert waiting(sh.study) == ()


def test_no_project_leaves_nothing_behind(sh: Shell, tmp_path: Path) -> None:
    assert cli.main(["queue", "list", str(tmp_path / "else" / "none.mosaic")]) == EXIT_CODES["project"]
    assert not (tmp_path / "else").exists()
