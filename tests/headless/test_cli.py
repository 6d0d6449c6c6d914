"""The command line as users and scripts meet it: what it prints, what it returns, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headless import cli
from headless import project as projects
from headless.commands.common import assignments, table
from headless.data.simulate import simulate
from headless.errors import EXIT_CODES, MosaicError
from headless.jobs.runfolder import RunFolder, State

COMMANDS = ("new", "add", "check", "run", "resume", "status", "queue", "evaluate", "export", "programs", "methods",
            "samples", "doctor", "worker")  # fmt: skip


class Shell:
    """Commands of one test: their exit code and output."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        self._capsys.readouterr()
        code = cli.main([str(item) for item in arguments])
        self.out, self.err = self._capsys.readouterr()
        return code

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def sh(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a paired batch, an RNA batch and a protein batch, one file each."""
    folder = tmp_path_factory.mktemp("sample")
    pattern = {"pair": ("rna", "adt"), "genes": ("rna",), "proteins": ("adt",)}
    simulate(150, n_genes=60, n_proteins=12, n_peaks=0, pattern=pattern, complete=False).write(folder)
    return folder


@pytest.fixture
def study(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A project with the sample in a folder of its own."""
    for file in sample.glob("*.h5mu"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "study.mosaic"
    files = [str(tmp_path / f"{name}.h5mu") for name in ("pair", "genes", "proteins")]
    assert cli.main(["new", str(path), "--data", *files, "--batch", "batch", "--label", "cell_type"]) == 0
    return path


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_with_examples(sh: Shell, name: str) -> None:
    assert sh(name, "--help") == 0
    assert "examples:" in sh.out
    assert f"mosaic-headless {name}" in sh.out.split("examples:")[1]


def test_help_names_every_command_and_exit_code(sh: Shell) -> None:
    assert sh("--help") == 0
    assert all(f"    {name} " in sh.out for name in COMMANDS)
    words = " ".join(sh.out.split())
    assert all(f"{code} {family}" in words for family, code in EXIT_CODES.items())


def test_examples_are_commands_that_parse(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    parser = cli.parser()
    checked = 0
    for name in COMMANDS:
        sh(name, "--help")
        for line in sh.out.split("examples:")[1].splitlines():
            if line.strip():
                words = shlex.split(line.split(">")[0])
                assert words[0] == "mosaic-headless"
                assert parser.parse_args(words[1:]).command == name
                checked += 1
    assert checked > 20


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    script = "import sys, headless.cli as c; c.parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert not {"numpy", "pandas", "torch", "anndata", "scanpy", "h5py"} & set(done.stdout.split())


# -- new -------------------------------------------------------------------------------------------------------------


def test_new_says_what_was_recognised_and_shows_the_mosaic(sh: Shell, sample: Path, tmp_path: Path) -> None:
    files = [sample / f"{name}.h5mu" for name in ("pair", "genes", "proteins")]
    assert sh("new", tmp_path / "s.mosaic", "--data", *files, "--batch", "batch", "--label", "cell_type") == 0
    assert "named 'rna'" in sh.out  # the reason
    lines = [line.split() for line in sh.out.splitlines()]
    assert ["batch", "cells", "rna", "adt"] in lines
    row = next(line for line in lines if line[:1] == ["genes"])
    assert row[1:3] == ["50", "50"]
    assert row[-1] == "."  # no proteins there
    assert projects.load(tmp_path / "s.mosaic").datasets[0].label_column == "cell_type"


def test_new_for_programs(sh: Shell, sample: Path, tmp_path: Path) -> None:
    assert sh("new", tmp_path / "s.mosaic", "--data", sample / "pair.h5mu", "--json") == 0
    pattern = sh.json["pattern"]
    assert pattern["batches"] == ["pair"]
    assert pattern["n_cells"] == {"pair": 50}
    assert [(tile["modality"], tile["n_cells"]) for tile in pattern["tiles"]] == [("rna", 50), ("adt", 50)]


def test_new_takes_a_batch_for_each_file(sh: Shell, sample: Path, tmp_path: Path) -> None:
    files = [sample / "pair.h5mu", sample / "genes.h5mu"]
    options = ["--batch", "pair=batch", "--batch-name", "genes=monday"]
    assert sh("new", tmp_path / "s.mosaic", "--data", *files, *options) == 0
    first, second = projects.load(tmp_path / "s.mosaic").datasets
    assert (first.batch_column, first.batch_name) == ("batch", None)
    assert (second.batch_column, second.batch_name) == (None, "monday")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--batch", "batch", "--batch-name", "x"], "usage.batch"),
        (["--batch", "batch", "--batch", "label"], "usage.twice"),
        (["--batch", "bacth"], "data.no_column"),
        (["--modality", "rna"], "usage.assignment"),
        (["--modality", "mod/rna=dna"], "data.unknown_modality"),
        (["--prepare", "n_top_gene=5"], "model.unknown_setting"),
        (["--preparation", "papr"], "model.unknown_preset"),
    ],
)
def test_new_refuses_what_it_cannot_do_and_writes_nothing(
    sh: Shell, sample: Path, tmp_path: Path, options: list[str], code: str
) -> None:
    path = tmp_path / "s.mosaic"
    returned = sh("new", path, "--data", sample / "pair.h5mu", *options)
    assert f"error [{code}]" in sh.err
    assert returned == EXIT_CODES[code.split(".")[0]]
    assert not path.exists()


def test_new_prepares_as_told(sh: Shell, sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.mosaic"
    assert (
        sh("new", path, "--data", sample / "pair.h5mu", "--prepare", "n_top_genes=30", "--modality", "mod/adt=skip")
        == 0
    )
    project = projects.load(path)
    assert project.preparation.n_top_genes == 30
    assert [matrix.modality for matrix in project.datasets[0].matrices] == ["rna"]


# -- add -------------------------------------------------------------------------------------------------------------


def test_add_keeps_what_was_asked_for(sh: Shell, study: Path) -> None:
    words = [
        "--name",
        "first",
        "--preset",
        "fast",
        "--seed",
        "4",
        "--set",
        "max_epochs=5",
        "--set",
        "trunk_hidden=[8, 8]",
    ]
    assert sh("add", study, *words, "--holdout", "0.1", "--outputs", "imputed,contribution") == 0
    made = projects.load(study).experiment("first")
    assert (made.model, made.preset, made.seed) == ("midas", "fast", 4)
    assert made.settings == {"max_epochs": 5, "trunk_hidden": [8, 8]}
    assert made.holdout.fraction == 0.1
    assert made.outputs == ("embedding", "imputed", "contribution")


@pytest.mark.parametrize(
    ("options", "code", "hint"),
    [
        (["--model", "midaz"], "model.unknown", "midas"),
        (["--set", "max_epoch=5"], "model.unknown_setting", "max_epochs"),
        (["--set", "max_epochs=many"], "model.bad_setting", ""),
        (["--set", "max_epochs"], "usage.assignment", "max_epochs=50"),
        (["--preset", "fats"], "model.unknown_preset", "fast"),
        (["--outputs", "imputd"], "usage.unknown_output", "imputed"),
        (["--device", "gpu"], "usage.experiment", ""),
        (["--holdout", "0.9"], "usage.experiment", ""),
    ],
)
def test_add_refuses_with_the_nearest_name(sh: Shell, study: Path, options: list[str], code: str, hint: str) -> None:
    before = study.read_bytes()
    assert sh("add", study, *options) == EXIT_CODES[code.split(".")[0]]
    assert f"error [{code}]" in sh.err
    assert hint in sh.err
    assert study.read_bytes() == before


def test_add_needs_the_lock(sh: Shell, study: Path) -> None:
    with projects.lock(study):
        assert sh("add", study) == EXIT_CODES["project"]
    assert "error [project.locked]" in sh.err
    assert sh("add", study) == 0


def test_add_lists_the_settings_of_a_method(sh: Shell, study: Path) -> None:
    assert sh("add", study, "--list") == 0
    assert "max_epochs = 2000 epochs" in sh.out
    assert "preset fast" in sh.out


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_builds_the_mosaic_and_asks_the_method(sh: Shell, study: Path) -> None:
    sh("add", study, "--name", "first", "--holdout", "0.2")
    before = sorted(item.name for item in study.parent.iterdir())
    assert sh("check", study, "--json") == 0
    report = sh.json
    assert report["pattern"]["batches"] == ["pair", "genes", "proteins"]
    assert report["experiments"][0]["verdict"].startswith("can run")
    assert any("hidden for scoring: adt" in reason for reason in report["experiments"][0]["reasons"])
    assert sorted(item.name for item in study.parent.iterdir()) == before


def test_check_tells_what_cannot_run_for_every_experiment(sh: Shell, study: Path) -> None:
    sh("add", study, "--name", "good")
    sh("add", study, "--name", "bad", "--holdout", "0.2", "--holdout-modalities", "atac")
    assert sh("check", study) == EXIT_CODES["model"]
    assert "bad: cannot run" in sh.out
    assert "good: can run" in sh.out
    assert sh("check", study, "--only", "good") == 0


def test_check_finds_moved_data_again(sh: Shell, study: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "deep" / "archive"
    elsewhere.mkdir(parents=True)
    (study.parent / "pair.h5mu").rename(elsewhere / "paired.h5mu")
    assert sh("check", study) == EXIT_CODES["project"]
    assert "error [project.moved_data]" in sh.err
    assert "--relink" in sh.err
    assert sh("check", study, "--relink", tmp_path / "deep") == 0
    assert projects.load(study).datasets[0].path == "deep/archive/paired.h5mu"
    assert sh("check", study) == 0


# -- the whole way ---------------------------------------------------------------------------------------------------


def test_the_whole_way(sh: Shell, study: Path) -> None:
    small = ["data_hidden=8", "trunk_hidden=[8]", "chunk_hidden=[8]", "dim_c=4", "max_epochs=2", "batch_size=32"]
    for name, outputs in (("first", "imputed,corrected"), ("second", "embedding")):
        settings = [word for item in small for word in ("--set", item)]
        assert sh("add", study, "--name", name, "--outputs", outputs, "--device", "cpu", *settings) == 0
    # Scoring has tests of its own; without labels it is quick.
    project = projects.load(study)
    plain = tuple(ref.model_copy(update={"label_column": None}) for ref in project.datasets)
    projects.save(project.model_copy(update={"datasets": plain}), study)
    inputs = {path: path.read_bytes() for path in study.parent.glob("*.h5mu")}

    assert sh("run", study, "--only", "first") == 0, sh.err
    assert "[first-1] train" in sh.out
    assert "[first-1] done" in sh.out
    assert sh("run", study, "--only", "first") == 0
    assert "done already" in sh.out
    assert sh("status", study, "--json") == 0
    assert [(run["run"], run["status"]) for run in sh.json["runs"]] == [("first-1", "done")]
    assert sh.json["not_run"] == ["second"]

    assert sh("run", study, "--only", "second", "--json") == 0
    events = [json.loads(line) for line in sh.out.splitlines()]
    begun = [event["name"] for event in events if event["kind"] == "phase" and event["event"] == "begin"]
    assert begun == ["load", "build", "train", "decode", "score"]
    assert {event["run"] for event in events} == {"second-1"}

    assert sh("evaluate", study, "--run", "first", "--json") == 0
    assert sh.json["metrics"]["cells"] == 150
    result = study.parent / "result.h5mu"
    assert sh("export", study, "--run", "first", "--to", result, "--layers", "imputed,corrected") == 0
    import mudata

    data = mudata.read_h5mu(result)
    assert data.n_obs == 150
    assert {"imputed", "corrected"} <= set(data.mod["rna"].layers)
    assert sh("export", study, "--run", "first", "--to", study.parent / "pair.h5mu") == EXIT_CODES["usage"]
    sets = study.parent / "sets.gmt"
    genes = data.mod["rna"].var_names[:12]
    sets.write_text("half\tof them\t" + "\t".join(genes) + "\n", encoding="utf-8")
    assert sh("programs", study, "--run", "second", "--top", 3, "--gene-sets", sets, "--to", study.parent / "p") == 0
    assert "dimension 4" in sh.out
    assert (study.parent / "p" / "gene_sets.csv").exists()
    assert len((study.parent / "p" / "rna.csv").read_text(encoding="utf-8").splitlines()) == 1 + 4 * data["rna"].n_vars
    assert sh("programs", study, "--run", "second", "--dimension", 2, "--json") == 0
    assert set(sh.json["programs"]["adt"]) == {"2"}
    assert sh("programs", study, "--run", "second", "--dimension", 9) == EXIT_CODES["usage"]
    assert "1 to 4" in sh.err
    assert sh("resume", study) == 0
    assert "Nothing waits" in sh.out
    assert {path: path.read_bytes() for path in inputs} == inputs


# -- runs that are there ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(sh: Shell, study: Path) -> RunFolder:
    """A run that waits."""
    sh("add", study, "--name", "first")
    project = projects.load(study)
    return RunFolder.create(study, project, project.experiment("first"))


def test_status_tells_why_a_run_failed(sh: Shell, study: Path, run: RunFolder) -> None:
    error = MosaicError("diverged.loss", "Training diverged in epoch 3.", "Lower the rate.")
    run.write_state(State(status="failed", updated="", remark=error.message, error=error.as_dict()))
    assert sh("status", study) == 0
    assert "failed" in sh.out
    assert "Training diverged in epoch 3." in sh.out


def test_status_survives_a_damaged_run(sh: Shell, study: Path, run: RunFolder) -> None:
    (run.path / "state.json").write_text("{", encoding="utf-8")
    assert sh("status", study, "--json") == 0
    assert sh.json["runs"][0]["status"] == "damaged"


@pytest.mark.parametrize("command", [["evaluate"], ["export", "--to", "x.h5mu"]])
def test_what_has_no_results_yet_is_told(sh: Shell, study: Path, run: RunFolder, command: list[str]) -> None:
    assert sh(command[0], study, "--run", "first", *command[1:]) == EXIT_CODES["run"]
    assert "queued" in sh.err


@pytest.mark.parametrize("command", [["evaluate"], ["export", "--to", "x.h5mu"], ["resume"]])
def test_an_unknown_run_suggests_the_nearest(sh: Shell, study: Path, run: RunFolder, command: list[str]) -> None:
    assert sh(command[0], study, "--run", "frist", *command[1:]) == EXIT_CODES["usage"]
    assert "Did you mean 'first'?" in sh.err


def test_an_unknown_experiment_suggests_the_nearest(sh: Shell, study: Path, run: RunFolder) -> None:
    assert sh("run", study, "--only", "frist") == EXIT_CODES["usage"]
    assert "Did you mean 'first'?" in sh.err


def test_a_run_that_is_over_is_not_resumed(sh: Shell, study: Path, run: RunFolder) -> None:
    run.write_state(State(status="cancelled", updated=""))
    assert sh("resume", study, "--run", "first") == EXIT_CODES["run"]
    assert "error [run.not_resumable]" in sh.err


def test_nothing_to_run_is_told(sh: Shell, study: Path) -> None:
    assert sh("run", study) == EXIT_CODES["usage"]
    assert "mosaic-headless add" in sh.err


def test_the_worker_refuses_what_is_no_run(sh: Shell, tmp_path: Path) -> None:
    assert sh("worker", tmp_path) == EXIT_CODES["run"]
    assert not list(tmp_path.iterdir())


# -- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_says_what_where_and_what_to_do(sh: Shell, tmp_path: Path) -> None:
    assert sh("status", tmp_path / "none.mosaic") == 4
    lines = sh.err.splitlines()
    assert lines[0] == "error [project.missing]: There is no project none.mosaic."
    assert lines[1] == f"  where: file {tmp_path / 'none.mosaic'}"
    assert lines[2].startswith("  what to do: ")
    assert not sh.out


def test_an_error_for_programs(sh: Shell, tmp_path: Path) -> None:
    assert sh("status", tmp_path / "none.mosaic", "--json") == 4
    error = json.loads(sh.err)
    assert (error["kind"], error["code"], error["exit_code"]) == ("error", "project.missing", 4)
    assert error["where"] == {"file": str(tmp_path / "none.mosaic")}


@pytest.mark.parametrize("arguments", [["ruun"], ["run"], ["status", "a", "--jsn"], ["add", "a", "--seed", "x"], []])
def test_a_wrong_command_line_is_a_usage_error(sh: Shell, arguments: list[str]) -> None:
    assert sh(*arguments) == EXIT_CODES["usage"]


def test_a_bug_is_told_as_one(sh: Shell, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(path: Path) -> None:
        raise ZeroDivisionError("by an unlucky thing")

    monkeypatch.setattr("headless.jobs.runfolder.list_runs", bug)
    assert sh("status", study) == EXIT_CODES["internal"]
    assert "ZeroDivisionError" in sh.err
    assert "Traceback" not in sh.err


def test_recovery_is_said_in_words(sh: Shell, study: Path) -> None:
    sh("add", study, "--name", "first")
    study.write_text("{", encoding="utf-8")
    assert sh("status", study) == 0
    assert "note: " in sh.err
    assert ".bak" in sh.err


# -- the machine -----------------------------------------------------------------------------------------------------


def test_doctor_tells_what_there_is(sh: Shell) -> None:
    assert sh("doctor", "--json") == 0
    report = sh.json
    assert report["versions"]["torch"] != "missing"
    assert report["devices"][0]["name"] == "cpu"
    assert report["methods"]["midas"] == "MIDAS"
    assert "h5mu" in report["readers"]
    assert report["faults"] == []


def test_doctor_tells_what_is_broken(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise MosaicError("device.unusable", "The driver is too old.")

    monkeypatch.setattr("headless.train.devices.describe", broken)
    assert sh("doctor") == EXIT_CODES["internal"]
    assert "The driver is too old." in sh.out


def test_methods_are_listed_and_explained(sh: Shell) -> None:
    from headless import models

    assert sh("methods") == 0
    for name in models.names():
        assert name in sh.out
    assert sh("methods", "multigrate") == 0
    assert "alignment" in sh.out
    assert sh("methods", "--json") == 0
    assert {row["name"] for row in sh.json["methods"]} == set(models.names())
    assert sh("methods", "midass") == EXIT_CODES["model"]
    assert "midas" in sh.err


def test_samples_are_listed(sh: Shell) -> None:
    assert sh("samples") == 0
    assert "blood" in sh.out
    assert sh("samples", "list", "--json") == 0
    assert "blood" in [row["name"] for row in sh.json["samples"]]
    assert sh("samples", "get", "blod", "--to", "x") == EXIT_CODES["usage"]


def test_version(sh: Shell) -> None:
    assert sh("--version") == 0
    assert sh.out.startswith("mosaic-headless ")


# -- small parts -----------------------------------------------------------------------------------------------------


def test_values_are_read_as_what_they_look_like() -> None:
    given = ["a=5", "b=1e-3", "c=true", "d=none", "e=[8, 8]", "f=one batch", "g=a=b"]
    expected = {"a": 5, "b": 1e-3, "c": True, "d": None, "e": [8, 8], "f": "one batch", "g": "a=b"}
    assert assignments(given, "--set") == expected


def test_numbers_stand_to_the_right() -> None:
    assert table([["a", 5], ["bb", 10]], ["", "n"]).splitlines() == ["       n", "  a    5", "  bb  10"]
