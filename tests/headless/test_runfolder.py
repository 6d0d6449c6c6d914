"""The run folder: a frozen request, a state that does not lie, events that a crash cannot spoil."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headless import project as projects
from headless.data.datasets import DatasetRef, Fingerprint, MatrixRef
from headless.data.holdout import Holdout
from headless.errors import MosaicError
from headless.jobs.events import read_events
from headless.jobs.runfolder import RunFolder, State, find_run, list_runs, request_of
from headless.lock import ProcessId
from headless.project import Experiment, Project


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.mosaic"
    ref = DatasetRef(
        id="a",
        path="a.h5mu",
        absolute="/elsewhere/a.h5mu",
        format="h5mu",
        fingerprint=Fingerprint(size=1, sha256="0" * 64),
        matrices=(MatrixRef(key="mod/rna", modality="rna"),),
    )
    projects.new(path, datasets=[ref])
    return path


def make(study: Path, **changes: Any) -> RunFolder:
    return RunFolder.create(study, projects.load(study), Experiment(**{"name": "First try", **changes}))


def running(process: ProcessId) -> State:
    return State(status="running", updated="now", process=process)


# -- the request -----------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_everything_but_the_data(study: Path) -> None:
    run = make(study, preset="fast", settings={"max_epochs": 3}, seed=5, holdout=Holdout(fraction=0.1))
    values = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    assert run.path == study.parent / "runs" / "first-try-1"
    assert run.base == study.parent
    assert values["id"] == "first-try-1"
    assert values["experiment"] == "First try"
    assert values["settings"]["max_epochs"] == 3
    assert values["settings"]["lr"] == 2e-3  # of the preset
    assert values["settings"]["dim_c"] == 32  # a default: the dump is complete
    assert values["datasets"][0]["fingerprint"]["sha256"] == "0" * 64
    assert values["preparation"]["n_top_genes"] == 4000
    assert (values["seed"], values["holdout"]["fraction"], values["device"]) == (5, 0.1, "auto")
    assert values["versions"]["torch"]
    assert run.status == "queued"


def test_the_request_does_not_follow_later_changes_of_the_project(study: Path) -> None:
    run = make(study)
    before = (run.path / "run.json").read_bytes()
    project = projects.load(study)
    projects.save(project.model_copy(update={"name": "renamed", "datasets": ()}), study)
    assert RunFolder(run.path).request.project == "study"
    assert (run.path / "run.json").read_bytes() == before


def test_every_run_has_a_folder_of_its_own(study: Path) -> None:
    made = [make(study).id, make(study, name="other").id, make(study).id]
    assert made == ["first-try-1", "other-1", "first-try-2"]
    (study.parent / "runs" / "first-try-7").mkdir()
    assert make(study).id == "first-try-8"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "midaz"}, "model.unknown"),
        ({"settings": {"max_epoch": 3}}, "model.unknown_setting"),
        ({"settings": {"max_epochs": -3}}, "model.bad_setting"),
        ({"preset": "quick"}, "model.unknown_preset"),
    ],
)
def test_an_impossible_experiment_makes_no_folder(study: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(MosaicError) as caught:
        make(study, **changes)
    assert caught.value.code == code
    assert not (study.parent / "runs").exists()


def test_equal_content_means_the_same_result(study: Path) -> None:
    project = projects.load(study)

    def content(project: Project = project, **changes: Any) -> str:
        return request_of(project, Experiment(**{"name": "e", **changes})).content

    moved = project.datasets[0].model_copy(update={"path": "b/a.h5mu", "absolute": "/b/a.h5mu"})
    changed = moved.model_copy(update={"fingerprint": Fingerprint(size=1, sha256="1" * 64)})
    assert content(name="another", device="cpu", notes="x") == content()
    assert content(project.model_copy(update={"datasets": (moved,)})) == content()
    assert content(settings={"lr": 1e-4}) == content()  # the default, said aloud
    assert content(project.model_copy(update={"datasets": (changed,)})) != content()
    assert content(seed=1) != content()
    assert content(settings={"lr": 2e-4}) != content()
    assert content(outputs=("embedding",)) != content()


@pytest.mark.parametrize(("text", "code"), [(None, "run.unknown"), ("{", "run.damaged"), ("{}", "run.damaged")])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str | None, code: str) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(MosaicError) as caught:
        _ = RunFolder(tmp_path).request
    assert caught.value.code == code


# -- finding runs ----------------------------------------------------------------------------------------------------


def test_runs_are_found_by_id_or_by_experiment(study: Path) -> None:
    for _ in range(11):
        make(study)
    assert [run.id for run in list_runs(study)] == [f"first-try-{n}" for n in range(1, 12)]
    assert find_run(study, "first-try-2").id == "first-try-2"
    assert find_run(study, "First try").id == "first-try-11"


def test_an_unknown_run_suggests_the_nearest_name(study: Path) -> None:
    with pytest.raises(MosaicError, match="no run") as caught:
        find_run(study, "first")
    assert "Nothing was run yet" in caught.value.hint
    make(study)
    with pytest.raises(MosaicError, match="no run") as caught:
        find_run(study, "First tri")
    assert (caught.value.code, caught.value.hint) == ("usage.unknown_run", "Did you mean 'First try'?")


# -- the state -------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_gone_was_interrupted(study: Path) -> None:
    run = make(study)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run.write_state(running(ProcessId.of(child.pid)))
    assert run.status == "running"
    child.kill()
    # Ended, but not yet looked after by its parent: such a process is gone too.
    assert wait_for(lambda: run.status == "interrupted")
    child.wait()
    assert run.status == "interrupted"


def wait_for(condition: Any, seconds: float = 10) -> bool:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_foreign_process_with_the_same_number_is_recognised(study: Path) -> None:
    run = make(study)
    me = ProcessId.of()
    run.write_state(running(me.model_copy(update={"started": me.started - 60, "token": ""})))
    assert run.status == "interrupted"


def test_the_worker_of_another_computer_is_believed(study: Path) -> None:
    run = make(study)
    run.write_state(running(ProcessId(pid=1, started=0, host="another-computer")))
    assert run.status == "running"


def test_a_half_written_state_is_never_seen(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    run = make(study)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MosaicError) as caught:
        run.write_state(State(status="done", updated=""))
    assert caught.value.code == "disk.full"
    assert run.state.status == "queued"
    assert not [item for item in run.path.iterdir() if item.suffix == ".tmp"]


# -- wishes ----------------------------------------------------------------------------------------------------------


def test_a_wish_arrives_and_each_is_another(study: Path) -> None:
    run = make(study)
    assert run.wish() is None
    seen = set()
    for _ in range(2):
        run.ask("pause")
        wish = run.wish()
        assert wish is not None
        assert wish[1] == "pause"
        seen.add(wish[0])
    assert len(seen) == 2


def test_an_unknown_wish_is_refused(study: Path) -> None:
    with pytest.raises(MosaicError, match="no wish") as caught:
        make(study).ask("puase")  # type: ignore[arg-type]
    assert "pause" in caught.value.hint


# -- events ----------------------------------------------------------------------------------------------------------


def test_events_are_followed_from_where_one_was(study: Path) -> None:
    run = make(study)
    assert run.events() == ([], 0)
    writer = run.writer()
    writer.emit("phase", name="load")
    events, offset = run.events()
    assert [(event["kind"], event["name"]) for event in events] == [("phase", "load")]
    assert events[0]["time"] > 1.6e9
    writer.emit("epoch", epoch=1, train={"a": float("nan"), "b": 2.5})
    events, offset = run.events(offset)
    assert events[0]["train"] == {"a": None, "b": 2.5}
    assert run.events(offset) == ([], offset)
    writer.close()


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b", "te')
    events, offset = read_events(path)
    assert [event["kind"] for event in events] == ["a"]
    with path.open("ab") as file:
        file.write('xt": "µ"}\n'.encode())
    events, _ = read_events(path, offset)
    assert events == [{"kind": "b", "text": "µ"}]


def test_a_line_cut_by_a_crash_does_not_spoil_the_next(study: Path) -> None:
    run = make(study)
    run.events_path.write_bytes(b'{"kind": "a"}\n{"kind": "b", "te')
    writer = run.writer()
    writer.emit("c")
    writer.close()
    assert [event["kind"] for event in run.events()[0]] == ["a", "c"]
    assert run.last("c") is not None
    assert run.last("b") is None


def test_the_last_event_is_found_in_a_long_file(study: Path) -> None:
    run = make(study)
    writer = run.writer()
    for epoch in range(2000):
        writer.emit("epoch", epoch=epoch)
    writer.close()
    last = run.last("epoch", within=1000)
    assert last is not None
    assert last["epoch"] == 1999
