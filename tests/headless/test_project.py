"""The project file: never half written, never lost, readable by the next version and on the next machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headless import project as projects
from headless.data.datasets import DatasetRef, MatrixRef
from headless.data.fingerprint import fingerprint
from headless.data.locate import paths_of
from headless.errors import MosaicError
from headless.lock import ProcessId
from headless.project import Experiment, Project


def data_file(path: Path, content: bytes = b"counts") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def reference(path: Path, base: Path, name: str = "a") -> DatasetRef:
    relative, absolute = paths_of(path, base)
    return DatasetRef(
        id=name,
        path=relative,
        absolute=absolute,
        format="h5mu",
        fingerprint=fingerprint(path),
        matrices=(MatrixRef(key="mod/rna", modality="rna"),),
        batch_column="batch",
    )


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A project with one data file beside it."""
    path = tmp_path / "study" / "study.mosaic"
    file = data_file(tmp_path / "study" / "data" / "a.h5mu")
    projects.new(path, datasets=[reference(file, path.parent)])
    return path


def refused(call: Any, *args: Any, **kwargs: Any) -> MosaicError:
    with pytest.raises(MosaicError) as caught:
        call(*args, **kwargs)
    return caught.value


# -- save and load --------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(study: Path) -> None:
    experiment = Experiment(name="First try", settings={"max_epochs": 3}, seed=7, outputs=("embedding", "imputed"))
    project = projects.load(study).with_experiment(experiment)
    projects.save(project, study)
    assert projects.load(study) == project
    assert projects.load(study).experiment("First try").seed == 7


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.text(max_size=30), seed=st.integers(), notes=st.text())
def test_any_text_survives_the_file(tmp_path: Path, name: str, seed: int, notes: str) -> None:
    path = tmp_path / "any.mosaic"
    project = Project(name=name, created="now", notes=notes, experiments=(Experiment(name="e", seed=seed),))
    projects.save(project, path)
    loaded = projects.load(path)
    assert (loaded.name, loaded.notes, loaded.experiments) == (name, notes, project.experiments)


def test_the_file_is_readable_json_with_relative_posix_paths(study: Path) -> None:
    values = json.loads(study.read_text(encoding="utf-8"))
    assert values["schema_version"] == projects.SCHEMA_VERSION
    assert values["datasets"][0]["path"] == "data/a.h5mu"


def test_the_save_before_is_kept_as_bak(study: Path) -> None:
    before = projects.load(study)
    projects.save(before.model_copy(update={"notes": "changed"}), study)
    assert projects.load(study.with_name("study.mosaic.bak")) == before
    assert projects.load(study).notes == "changed"


def test_a_new_project_never_replaces_a_file(study: Path) -> None:
    before = study.read_bytes()
    assert refused(projects.new, study).code == "project.exists"
    assert study.read_bytes() == before


def test_a_full_disk_leaves_the_old_project_whole(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = study.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    error = refused(projects.save, projects.load(study).model_copy(update={"notes": "new"}), study)
    assert error.code == "disk.full"
    assert study.read_bytes() == before
    assert sorted(item.name for item in study.parent.iterdir()) == ["data", "study.mosaic"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder_is_told(study: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before = study.read_bytes()

    def forbidden(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", forbidden)
    error = refused(projects.save, projects.load(study), study)
    assert error.code == "disk.read_only"
    assert error.exit_code == 9
    assert study.read_bytes() == before


def test_a_kill_while_saving_costs_nothing(study: Path) -> None:
    # The process dies by itself at the last moment before the rename, with the new text on disk.
    script = (
        "import os, sys; from headless import project as p; "
        "os.replace = lambda *a: os.kill(os.getpid(), 9) if str(a[1]).endswith('.mosaic') else os.rename(*a); "
        "x = p.load(sys.argv[1]); p.save(x.model_copy(update={'notes': 'n' * 100000}), sys.argv[1])"
    )
    before = study.read_bytes()
    done = subprocess.run([sys.executable, "-c", script, str(study)], check=False, timeout=60)
    assert done.returncode == -9
    assert study.read_bytes() == before
    projects.save(projects.load(study).model_copy(update={"notes": "after"}), study)
    assert projects.load(study).notes == "after"


# -- damage and recovery ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["", '{"schema_version": 1, "name": "st', "\x00\x00\x00", "[1, 2]"])
def test_a_damaged_file_is_recovered_from_the_copy_in_words(study: Path, damage: str) -> None:
    good = projects.load(study)
    projects.save(good.model_copy(update={"notes": "last"}), study)
    study.write_text(damage, encoding="utf-8")
    said: list[str] = []
    assert projects.load(study, note=said.append) == good
    assert len(said) == 1
    assert "study.mosaic.bak" in said[0]
    # Saving what was recovered keeps the good copy instead of the damaged file.
    projects.save(good, study)
    assert projects.load(study.with_name("study.mosaic.bak")) == good


def test_a_lost_file_is_recovered_from_the_copy(study: Path) -> None:
    projects.save(projects.load(study), study)
    study.unlink()
    said: list[str] = []
    assert projects.load(study, note=said.append).name == "study"
    assert said


def test_without_a_copy_the_damage_is_told(study: Path) -> None:
    study.write_text("{", encoding="utf-8")
    error = refused(projects.load, study)
    assert (error.code, error.exit_code) == ("project.damaged", 4)
    assert refused(projects.load, study.with_name("none.mosaic")).code == "project.missing"


def test_a_misspelt_field_is_told_and_not_recovered_from(study: Path) -> None:
    projects.save(projects.load(study), study)
    values = json.loads(study.read_text(encoding="utf-8"))
    values["preparation"]["n_top_gene"] = 5
    study.write_text(json.dumps(values), encoding="utf-8")
    error = refused(projects.load, study)
    assert error.code == "project.invalid"
    assert error.field == "preparation.n_top_gene"


# -- versions --------------------------------------------------------------------------------------------------------


def test_a_newer_file_is_refused_unchanged(study: Path) -> None:
    values = json.loads(study.read_text(encoding="utf-8")) | {"schema_version": projects.SCHEMA_VERSION + 1}
    study.write_text(json.dumps(values), encoding="utf-8")
    before = study.read_bytes()
    error = refused(projects.load, study)
    assert error.code == "project.newer"
    assert "newer" in error.message
    assert study.read_bytes() == before


def test_older_files_are_migrated_step_by_step(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads(study.read_text(encoding="utf-8"))
    values["title"] = values.pop("name")
    values["schema_version"] = 1
    study.write_text(json.dumps(values), encoding="utf-8")

    def two(old: dict[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in old.items() if key != "title"}, "heading": old["title"]}

    def three(old: dict[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in old.items() if key != "heading"}, "name": old["heading"] + "!"}

    monkeypatch.setattr(projects, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(projects, "MIGRATIONS", {1: two, 2: three})
    assert projects.load(study).name == "study!"


@pytest.mark.parametrize("version", [None, "1", True, 0])
def test_a_file_without_a_known_version_is_refused(study: Path, version: object) -> None:
    values = json.loads(study.read_text(encoding="utf-8")) | {"schema_version": version}
    study.write_text(json.dumps(values), encoding="utf-8")
    assert refused(projects.load, study).code == "project.invalid"


def test_every_older_version_has_a_migration() -> None:
    assert set(projects.MIGRATIONS) == set(range(1, projects.SCHEMA_VERSION))


# -- the lock --------------------------------------------------------------------------------------------------------


def test_a_second_opener_is_told_who_holds_the_lock(study: Path) -> None:
    with projects.lock(study):
        error = refused(projects.lock(study).acquire)
        assert error.code == "project.locked"
        assert str(os.getpid()) in error.message
        assert ProcessId.of().host in error.message
        assert projects.load(study).name == "study"  # reading needs no lock
    with projects.lock(study):
        pass
    assert not study.with_name("study.mosaic.lock").exists()


def holder(process: ProcessId) -> str:
    return json.dumps({"process": process.model_dump(), "user": "somebody", "since": "yesterday"})


def test_the_lock_of_a_dead_process_is_taken_over(study: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = ProcessId.of(child.pid)
    lock_file = study.with_name("study.mosaic.lock")
    lock_file.write_text(holder(dead), encoding="utf-8")
    assert refused(projects.lock(study).acquire).code == "project.locked"
    child.kill()
    child.wait()
    with projects.lock(study):
        assert str(os.getpid()) in lock_file.read_text(encoding="utf-8")


def test_a_pid_that_was_given_to_another_process_does_not_hold(study: Path) -> None:
    reused = ProcessId.of().model_copy(update={"started": ProcessId.of().started - 1000, "token": ""})
    study.with_name("study.mosaic.lock").write_text(holder(reused), encoding="utf-8")
    with projects.lock(study):
        pass


def test_the_lock_of_another_computer_is_never_broken(study: Path) -> None:
    elsewhere = ProcessId(pid=1, started=0.0, host="another-computer")
    study.with_name("study.mosaic.lock").write_text(holder(elsewhere), encoding="utf-8")
    error = refused(projects.lock(study).acquire)
    assert "another-computer" in error.message
    assert "study.mosaic.lock" in error.hint


def test_an_unreadable_old_lock_is_a_left_over(study: Path) -> None:
    lock_file = study.with_name("study.mosaic.lock")
    lock_file.write_text("", encoding="utf-8")
    os.utime(lock_file, (1, 1))
    with projects.lock(study):
        pass


# -- where the data are ----------------------------------------------------------------------------------------------


def test_a_study_folder_opens_where_it_was_moved_to(study: Path, tmp_path: Path) -> None:
    moved = tmp_path / "another machine"
    study.parent.rename(moved)
    ref = projects.load(moved / "study.mosaic").datasets[0]
    assert projects.resolve(ref, moved) == moved / "data" / "a.h5mu"


def test_the_absolute_path_is_the_second_try(study: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "study.mosaic"
    copy.parent.mkdir()
    shutil.copy(study, copy)
    ref = projects.load(copy).datasets[0]
    assert projects.resolve(ref, copy.parent) == study.parent / "data" / "a.h5mu"


def test_moved_data_are_told_and_relinked_by_content(study: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    data_file(archive / "other" / "a.h5mu", b"not the same")
    (study.parent / "data" / "a.h5mu").rename(archive / "renamed.h5mu")
    project = projects.load(study)
    error = refused(projects.resolve, project.datasets[0], study.parent)
    assert (error.code, error.exit_code) == ("project.moved_data", 4)
    assert "a.h5mu" in str(error)
    linked = projects.relink(project, study.parent, archive)
    assert projects.resolve(linked.datasets[0], study.parent) == archive / "renamed.h5mu"
    assert linked.datasets[0].path == "../archive/renamed.h5mu"


def test_relinking_keeps_what_is_in_place_and_names_what_is_lost(study: Path, tmp_path: Path) -> None:
    file = data_file(tmp_path / "b.h5mu", b"other counts")
    project = projects.load(study).with_datasets([reference(file, study.parent, "b")])
    file.unlink()
    error = refused(projects.relink, project, study.parent, tmp_path)
    assert error.code == "project.moved_data"
    assert "b" in error.message
    assert "a," not in error.message


def test_relinking_to_another_file_is_refused(study: Path, tmp_path: Path) -> None:
    (study.parent / "data" / "a.h5mu").unlink()
    wrong = data_file(tmp_path / "wrong.h5mu", b"another")
    error = refused(projects.relink, projects.load(study), study.parent, {"a": wrong})
    assert error.code == "project.data_changed"


def test_changed_data_are_told(study: Path) -> None:
    data_file(study.parent / "data" / "a.h5mu", b"Counts")  # the same size
    ref = projects.load(study).datasets[0]
    error = refused(projects.resolve, ref, study.parent)
    assert error.code == "project.data_changed"
    assert error.hint


# -- experiments and data --------------------------------------------------------------------------------------------


def test_an_unknown_experiment_suggests_the_nearest_name() -> None:
    project = Project(name="p", created="", experiments=(Experiment(name="baseline"), Experiment(name="x")))
    error = refused(project.experiment, "basline")
    assert (error.code, error.exit_code) == ("usage.unknown_experiment", 2)
    assert "baseline" in error.hint


def test_two_experiments_never_share_a_folder_name() -> None:
    project = Project(name="p", created="").with_experiment(Experiment(name="First Try"))
    assert refused(project.with_experiment, Experiment(name="first-try")).code == "project.name_taken"


def test_a_file_is_not_added_twice(study: Path) -> None:
    project = projects.load(study)
    again = project.datasets[0].model_copy(update={"id": "again"})
    assert refused(project.with_datasets, [again]).code == "project.data_twice"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "CPU"])
def test_a_device_that_does_not_exist_is_no_experiment(device: str) -> None:
    with pytest.raises(ValueError, match="choose auto, cpu, cuda or cuda:N"):
        Experiment(name="e", device=device)


def test_the_outputs_of_an_experiment_are_those_of_the_tasks() -> None:
    from headless.tasks import OUTPUTS

    assert set(get_args(projects.Output)) == set(OUTPUTS)
