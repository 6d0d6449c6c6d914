"""``mosaic-headless``: everything that the window can do, for the shell, for scripts and for clusters.

The exit codes are those of :data:`headless.errors.EXIT_CODES`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from headless.commands import add, check, doctor, evaluate, export, methods, new, programs, queue, run, samples, status
from headless.commands.common import print_error
from headless.errors import EXIT_CODES, MosaicError, from_os_error

_MODULES = (new, add, check, run, status, queue, evaluate, export, programs, methods, samples, doctor)

_CODES = ", ".join(f"{code} {family}" for family, code in EXIT_CODES.items())


class _Parser(argparse.ArgumentParser):
    """Faults of the command line are told like all others."""

    def error(self, message: str) -> NoReturn:
        raise MosaicError("usage.arguments", message.rstrip(".") + ".", f"See {self.prog} --help.")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    made = _Parser(
        prog="mosaic-headless",
        description="Integrate single-cell batches that measure different modalities, without a window.",
        epilog="examples:\n"
        "  mosaic-headless samples make blood --to demo\n"
        "  mosaic-headless new demo/blood.mosaic --data demo/*.h5mu --batch batch --label cell_type\n"
        "  mosaic-headless add demo/blood.mosaic --model midas --name first --preset fast\n"
        "  mosaic-headless run demo/blood.mosaic\n\n"
        f"exit codes: {_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="store_true", help="print the version and end")
    commands = made.add_subparsers(dest="command", metavar="COMMAND")
    for module in _MODULES:
        module.add(commands)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command; its exit code. Errors go to stderr in words (as JSON with ``--json``)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        return _carry_out(argv)
    except MosaicError as error:
        print_error(error, as_json)
        return error.exit_code
    except SystemExit as ended:  # argparse, after --help
        return ended.code if isinstance(ended.code, int) else 0
    except KeyboardInterrupt:
        print_error(MosaicError("stopped.interrupted", "Interrupted."), as_json)
        return EXIT_CODES["stopped"]
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CODES["ok"]
    except Exception as error:
        known = _in_words(error)
        print_error(known, as_json)
        return known.exit_code


def _carry_out(argv: list[str]) -> int:
    made = parser()
    args = made.parse_args(argv)
    if args.version:
        import headless

        print(f"mosaic-headless {headless.__version__}")
        return EXIT_CODES["ok"]
    call: Any = getattr(args, "call", None)
    if call is None:
        made.print_help()
        return EXIT_CODES["usage"]
    return int(call(args))


def _in_words(error: Exception) -> MosaicError:
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return from_os_error(error, error.filename, "carry out the command")
    if isinstance(error, MemoryError):
        return MosaicError("memory.ram", "The computer ran out of memory.", "Close other programs, or use less data.")
    if os.environ.get("MOSAIC_TRACEBACK"):
        raise error
    return MosaicError(
        "internal.bug",
        f"Something went wrong that is not your fault: {type(error).__name__}: {error}",
        "Repeat with MOSAIC_TRACEBACK=1 in the environment and report what it prints.",
    )


if __name__ == "__main__":
    sys.exit(main())
