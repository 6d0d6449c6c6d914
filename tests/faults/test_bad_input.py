"""Whatever a user gets wrong, or the machine: one error in words, its exit code, and nothing broken on disk.

Everything goes through the real command line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from headless import cli
from headless import project as projects
from headless.data.simulate import simulate
from headless.errors import EXIT_CODES
from headless.jobs.runfolder import find_run

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Carry out a command that must fail with a code; what it said."""

    def carry_out(code: str, *arguments: object) -> str:
        capsys.readouterr()
        returned = cli.main([str(item) for item in arguments])
        said = capsys.readouterr().err
        assert f"error [{code}]" in said, said
        assert returned == EXIT_CODES[code.split(".")[0]]
        assert "Traceback" not in said
        return said

    return carry_out


def counts(cells: int = 60, features: int = 30, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).poisson(1.0, (cells, features)).astype(np.float32)
    x[:, 0] += 1
    return x


def write(path: Path, x: np.ndarray, names: list[str], barcodes: list[str] | None = None) -> Path:
    barcodes = barcodes or [f"{path.stem}{i}" for i in range(len(x))]
    data = ad.AnnData(sp.csr_matrix(x), obs=pd.DataFrame(index=barcodes), var=pd.DataFrame(index=names))
    data.write_h5ad(path)
    return path


def genes(n: int = 30, prefix: str = "GENE") -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def new(path: Path, *data: Path, options: tuple[str, ...] = ("--modality", "X=rna")) -> Path:
    assert cli.main(["new", str(path), "--data", *map(str, data), *options]) == 0
    return path


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_missing_file(fails: Fails, tmp_path: Path) -> None:
    said = fails("data.missing_file", "new", tmp_path / "s.mosaic", "--data", tmp_path / "none.h5mu")
    assert "none.h5mu" in said
    assert "what to do:" in said
    assert not list(tmp_path.iterdir())


def test_an_empty_file(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "a.h5mu").touch()
    fails("data.empty", "new", tmp_path / "s.mosaic", "--data", tmp_path / "a.h5mu")
    assert not (tmp_path / "s.mosaic").exists()


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_truncated_file(fails: Fails, tmp_path: Path, share: float) -> None:
    (path,) = simulate(60, n_genes=60, n_proteins=10, n_peaks=0, pattern={"a": ("rna", "adt")}, complete=False).write(
        tmp_path
    )
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    said = fails("data.truncated", "new", tmp_path / "s.mosaic", "--data", path)
    assert "a.h5mu" in said


@pytest.mark.parametrize(("value", "shown"), [(-1.0, "-1"), (0.5, "0.5"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_values_that_are_no_counts(fails: Fails, tmp_path: Path, value: float, shown: str) -> None:
    x = counts()
    x[3:, 4] = value
    path = write(tmp_path / "a.h5ad", x, genes())
    said = fails("data.not_counts", "new", tmp_path / "s.mosaic", "--data", path, "--modality", "X=rna")
    assert shown in said.lower()


def test_one_wrong_value_far_inside_is_found_before_training(fails: Fails, tmp_path: Path) -> None:
    x = counts(5000, 40)
    x[4321, 17] = 2.5
    study = tmp_path / "s.mosaic"
    path = write(tmp_path / "a.h5ad", x, genes(40))
    # The first look reads a sample of the values; the check reads all of them.
    looked = cli.main(["new", str(study), "--data", str(path), "--modality", "X=rna"])
    assert looked in (EXIT_CODES["ok"], EXIT_CODES["data"])
    if looked == EXIT_CODES["ok"]:
        fails("data.not_counts", "check", study)


def test_a_modality_that_nobody_recognises(fails: Fails, tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(), [f"thing {i}" for i in range(30)])
    said = fails("data.unknown_modality", "new", tmp_path / "s.mosaic", "--data", path)
    assert "rna, adt or atac" in said


def test_a_file_that_changed_since_it_was_added(fails: Fails, tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(), genes())
    study = new(tmp_path / "s.mosaic", path)
    write(path, counts(seed=1), genes())
    said = fails("project.data_changed", "check", study)
    assert "a.h5ad" in said


# -- what the files hold together --------------------------------------------------------------------------------------


def test_duplicate_barcodes(fails: Fails, tmp_path: Path) -> None:
    barcodes = [f"c{i}" for i in range(60)]
    rna = write(tmp_path / "rna.h5ad", counts(), genes(), [*barcodes[:59], "c0"])
    adt = write(tmp_path / "adt.h5ad", counts(60, 8), [f"CD{i}" for i in range(1, 9)], barcodes)
    study = tmp_path / "s.mosaic"
    # Both are one batch, so that a barcode's partner is ambiguous.
    for name, path, modality in (("rna", rna, "rna"), ("adt", adt, "adt")):
        options = ["--batch-name", "x", "--modality", f"X={modality}"]
        assert cli.main(["new", str(tmp_path / f"{name}.mosaic"), "--data", str(path), *options]) == 0
    refs = [projects.load(tmp_path / f"{name}.mosaic").datasets[0] for name in ("rna", "adt")]
    projects.new(study, datasets=refs)
    said = fails("data.duplicate_barcodes", "check", study)
    assert "c0" in said


def test_no_shared_feature(fails: Fails, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.h5ad", counts(), genes(prefix=name.upper())) for name in ("aa", "bb")]
    fails("data.no_shared_feature", "check", new(tmp_path / "s.mosaic", *files))


def peaks(starts: range, chrom: str) -> list[str]:
    return [f"{chrom}:{start}-{start + 500}" for start in starts]


def test_a_genome_that_the_peaks_are_not_on(fails: Fails, tmp_path: Path) -> None:
    # Chromosome 1 has 249 million bases in man (hg38: 248 956 422) and 195 million in the mouse.
    path = write(
        tmp_path / "a.h5ad", np.minimum(counts(), 1), peaks(range(200_000_000, 230_000_000, 1_000_000), "chr1")
    )
    study = new(tmp_path / "s.mosaic", path, options=("--prepare", "genome=mm10", "--modality", "X=atac"))
    said = fails("data.wrong_genome", "check", study)
    assert "mm10" in said


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small batch with RNA and protein."""
    folder = tmp_path_factory.mktemp("sample")
    (path,) = simulate(60, n_genes=40, n_proteins=8, n_peaks=0, pattern={"a": ("rna", "adt")}, complete=False).write(
        folder
    )
    return path


@pytest.fixture
def study(sample: Path, tmp_path: Path) -> Path:
    return new(tmp_path / "s.mosaic", sample, options=())


def test_an_unknown_method(fails: Fails, study: Path) -> None:
    assert "'midas'" in fails("model.unknown", "add", study, "--model", "midsa")


def test_a_misspelt_setting(fails: Fails, study: Path) -> None:
    assert "'batch_size'" in fails("model.unknown_setting", "add", study, "--set", "bath_size=5")


@pytest.mark.parametrize("setting", ["batch_size=1", "lr=-1", "precision=half", "max_epochs=1.5", "trunk_hidden=[]"])
def test_an_impossible_setting(fails: Fails, study: Path, setting: str) -> None:
    assert setting.split("=")[0] in fails("model.bad_setting", "add", study, "--set", setting)


def test_a_holdout_of_what_is_not_there(fails: Fails, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["add", str(study), "--name", "e", "--holdout", "0.1", "--holdout-modalities", "atac"]) == 0
    assert cli.main(["check", str(study)]) == EXIT_CODES["model"]
    assert "atac cannot be hidden" in capsys.readouterr().out
    said = fails("model.bad_holdout", "run", study)
    assert "run e-1" in said
    assert find_run(study, "e").status == "failed"


def test_a_gpu_that_is_not_there(fails: Fails, study: Path) -> None:
    import torch

    wish = f"cuda:{torch.cuda.device_count()}"
    assert cli.main(["add", str(study), "--name", "e", "--device", wish]) == 0
    fails("device.unusable", "run", study)
    assert find_run(study, "e").status == "failed"


def test_a_project_of_a_newer_program(fails: Fails, study: Path) -> None:
    study.write_text(study.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    for command in (["status"], ["check"], ["add"], ["run"], ["evaluate", "--run", "x"]):
        fails("project.newer", command[0], study, *command[1:])


def test_a_damaged_project(fails: Fails, study: Path) -> None:
    study.write_bytes(os.urandom(500))
    fails("project.damaged", "status", study)


# -- the disk ----------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; skipped where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no room on the file system."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (65_536, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_a_full_disk(fails: Fails, sample: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=256k") as folder:
        study = new(folder / "s.mosaic", sample, options=())
        assert cli.main(["add", str(study), "--name", "kept"]) == 0
        before = {path: path.read_bytes() for path in folder.iterdir()}
        fill(folder)
        fails("disk.full", "add", study, "--name", "more")
        fails("disk.full", "new", folder / "other.mosaic", "--data", sample)
        fails("disk.full", "run", study)
        assert {path: path.read_bytes() for path in before} == before
        assert not (folder / "other.mosaic").exists()
        (folder / "filler").unlink()
        assert cli.main(["add", str(study), "--name", "more"]) == 0
        assert [item.name for item in projects.load(study).experiments] == ["kept", "more"]


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_run(sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("data_hidden=8", "trunk_hidden=[8]", "dim_c=4", "max_epochs=1")
    with mounted(tmp_path / "small", "size=256k") as folder:
        study = new(folder / "s.mosaic", sample, options=())
        options = [word for item in small for word in ("--set", item)]
        assert cli.main(["add", str(study), "--name", "e", "--device", "cpu", *options]) == 0
        (folder / "filler").write_bytes(bytes(200_000))  # room for the request, not for checkpoints
        capsys.readouterr()
        assert cli.main(["run", str(study)]) == EXIT_CODES["disk"]
        assert "error [disk.full]" in capsys.readouterr().err
        assert projects.load(study).experiments[0].name == "e"
        assert find_run(study, "e").status in ("failed", "interrupted")


def test_a_read_only_folder(fails: Fails, sample: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as folder:
        study = new(folder / "s.mosaic", sample, options=())
        assert cli.main(["add", str(study), "--name", "kept"]) == 0
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        fails("disk.read_only", "add", study, "--name", "more")
        fails("disk.read_only", "new", folder / "other.mosaic", "--data", sample)
        fails("disk.read_only", "run", study)
        # Reading goes on.
        assert cli.main(["status", str(study)]) == 0
        assert cli.main(["check", str(study)]) == 0
