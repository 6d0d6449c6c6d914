"""One writer at a time: lock files that say who holds them, and processes recognised by more than a number."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from pydantic import ValidationError

from headless.errors import MosaicError, from_os_error
from headless.files import now
from headless.schema import Frozen


class ProcessId(Frozen):
    """A process: its number alone is reused after it ended, number and start time together are not.

    ``started`` is in seconds since the epoch, as the operating system tells it. It moves when the clock is set, so on
    Linux ``token`` (the boot and the ticks since then) decides; it is empty elsewhere.
    """

    pid: int
    started: float
    host: str
    token: str = ""

    @classmethod
    def of(cls, pid: int | None = None) -> ProcessId:
        """The process ``pid``, or this one; one that has ended already is a process that is not alive."""
        try:
            process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            return cls(pid=pid or 0, started=0.0, host=socket.gethostname())
        return cls(
            pid=process.pid,
            started=process.create_time(),
            host=socket.gethostname(),
            token=_token(process.pid),
        )

    @property
    def here(self) -> bool:
        """Is it (or was it) a process of this computer?"""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool | None:
        """Is it still running; ``None`` when it belongs to another computer and cannot be asked."""
        if not self.here:
            return None
        try:
            process = psutil.Process(self.pid)
            token = _token(self.pid) if self.token else ""
            same = token == self.token if token else abs(process.create_time() - self.started) < 1.0
            # A zombie has ended and waits only for its parent to look.
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


class Holder(Frozen):
    """Who holds a lock; ``id`` tells two holds of the same process in the same second apart."""

    process: ProcessId
    user: str
    since: str
    id: str = ""

    def __str__(self) -> str:
        return f"process {self.process.pid} of {self.user} on {self.process.host} since {self.since}"


class Lock:
    """A lock file; a context manager that holds it.

    A lock whose process of this computer is gone is taken over. One of another computer is never broken: the message
    names the holder and the file to delete.

    Parameters
    ----------
    path
        The lock file.
    code, what
        Code of the error when somebody else holds it, and what is locked, in words.
    hint
        What to do then, beside what is said of the lock file.
    """

    #: A lock file without readable content is given this long to be written before it counts as a left-over.
    GRACE_SECONDS = 10.0

    def __init__(self, path: Path, code: str, what: str, hint: str = "") -> None:
        self.path = path
        self.code = code
        self.what = what
        self.hint = hint
        self._held: Holder | None = None

    def holder(self) -> Holder | None:
        """Who holds the lock now; ``None`` if nobody does (no file, or a left-over of a process that is gone)."""
        text = self._read()
        if text is None:
            return None
        holder = _parse(text)
        return holder if holder is not None and holder.process.alive is not False else None

    def acquire(self) -> Self:
        """Take the lock.

        Raises
        ------
        MosaicError
            ``code`` when somebody else holds it; ``disk.*`` when the file cannot be written.
        """
        mine = Holder(process=ProcessId.of(), user=_user(), since=now(), id=uuid.uuid4().hex)
        for _ in range(5):
            if self._create(mine):
                self._held = mine
                return self
            text = self._read()
            if text is None:
                continue  # released between the two looks
            holder = _parse(text)
            if holder is None and self._young():
                time.sleep(0.05)
                continue
            if holder is not None and holder.process.alive is not False:
                raise self._refusal(holder)
            self._remove_stale(text)
        raise self._refusal(None)

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not ours (any more)."""
        if self._held is not None and (text := self._read()) is not None and _parse(text) == self._held:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._held = None

    @property
    def held(self) -> bool:
        """Is it still ours? Somebody may have deleted the file by hand, and another taken it."""
        return self._held is not None and _parse(self._read() or "") == self._held

    def __enter__(self) -> Self:
        return self if self._held else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _create(self, holder: Holder) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise from_os_error(error, self.path, f"lock {self.what}") from error
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(holder.model_dump_json())
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise from_os_error(error, self.path, f"lock {self.what}") from error
        return True

    def _read(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):
            return ""

    def _young(self) -> bool:
        try:
            # The clock may have been set, or be that of a network drive: neither makes a lock young for ever.
            return abs(time.time() - self.path.stat().st_mtime) < self.GRACE_SECONDS
        except OSError:
            return False

    def _remove_stale(self, seen: str) -> None:
        """Take away the left-over that was seen, and only that one: another process may be doing the same."""
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.stale")
        try:
            os.rename(self.path, aside)
            if aside.read_text(encoding="utf-8") != seen:  # a fresh lock slipped in between: put it back
                os.rename(aside, self.path)
                return
            aside.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, self.path, f"take over the lock of {self.what}") from error

    def _refusal(self, holder: Holder | None) -> MosaicError:
        who = str(holder) if holder else "another process"
        if holder is None or not holder.process.here:
            hint = f"If that program has surely ended, delete {self.path.name} and repeat."
        else:
            hint = "Close that program or wait until it has finished."
        return MosaicError(self.code, f"{self.what} is in use by {who}.", f"{self.hint} {hint}".strip(), file=self.path)


def _parse(text: str) -> Holder | None:
    try:
        return Holder.model_validate(json.loads(text))
    except (ValueError, ValidationError):
        return None


def _token(pid: int) -> str:
    """Boot and start of a process, on which setting the clock has no effect; empty where Linux does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name of the program, in parentheses, may hold anything; the start is the 20th field after it.
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{boot}:{ticks}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user inside some containers
        return "unknown user"
