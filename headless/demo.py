"""The whole way once, with a small simulated sample: ``python -m headless.demo [--to FOLDER]``.

Every step is a command of ``mosaic-headless``, printed before it runs, so that the demo is also the tutorial.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from headless import cli


def steps(folder: Path) -> Iterator[list[str]]:
    """The commands one by one; the later ones name files that the earlier ones have made."""
    project = str(folder / "blood.mosaic")
    result = str(folder / "result.h5mu")
    files = folder / "files"
    yield ["samples", "make", "blood", "--to", str(files)]
    data = [str(path) for path in sorted(files.glob("*.h5mu"))]
    yield ["new", project, "--data", *data, "--batch", "batch", "--label", "cell_type"]
    # The preset's 6000 steps would take ten minutes on two cores.
    yield [
        "add", project, "--model", "midas", "--name", "first", "--preset", "fast", "--set", "max_steps=800",
        "--seed", "0", "--holdout", "0.1",
    ]  # fmt: skip
    yield ["check", project]
    yield ["run", project]
    yield ["status", project]
    yield ["evaluate", project, "--run", "first"]
    yield ["programs", project, "--run", "first", "--dimension", "1"]
    yield ["export", project, "--run", "first", "--to", result, "--layers", "imputed,corrected"]


def free(folder: Path) -> Path:
    """The folder, or the first of ``folder-2``, ``folder-3`` ... that is not there yet: nothing is overwritten."""
    candidate, number = folder, 1
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def main(argv: Sequence[str] | None = None) -> int:
    """Go the whole way; the exit code of the first command that fails, 0 if none does."""
    parser = argparse.ArgumentParser(prog="python -m headless.demo", description=main.__doc__)
    parser.add_argument("--to", type=Path, default=Path("demo"), help="folder to work in (default: demo)")
    folder = free(parser.parse_args(argv).to)
    begin = time.monotonic()
    for step in steps(folder):
        print(f"\n$ mosaic-headless {shlex.join(step)}", flush=True)
        code = cli.main(step)
        if code:
            print(f"\nThe demo stopped here with exit code {code}.", file=sys.stderr)
            return code
    print(
        f"\nDone in {time.monotonic() - begin:.0f} s. {folder / 'result.h5mu'} is ready for scanpy (mudata.read); "
        f"the project is {folder / 'blood.mosaic'}, what happened is in {folder / 'runs'}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
