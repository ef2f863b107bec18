"""A lock that gives an output folder to one run at a time.

Whether its process lives is known on the same machine. A process of another machine, which may have the same host name, lives
as long as it touches the lock file: a heartbeat, timed by the clock of the file system.
"""

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

import psutil
import torch

from ..parsing import parse_json
from .processes import is_first, world_size


LOCK_FILE = "run.lock"
# Seconds by which the start of a process may differ from its lock's: the system's clock may have been set meanwhile.
CLOCK_TOLERANCE = 10.0
# Seconds within which a lock that was just created gets its content.
WRITING_TIME = 2.0
# Seconds between two heartbeats, and seconds of silence after which the process of another machine counts as ended.
BEAT, SILENCE = 20.0, 180.0
# Beyond any process number, and any time before the year 2100.
LARGEST_ENTRY = 2**32


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Args:
        pid, host: Of the process; host is empty for a lock that names none.
        started: Start of the process, in seconds since 1970. It tells the process from a later one with the same number.
        machine: Tells the machine, until it is booted again, and the container from others with the same host name.
    """

    pid: int
    host: str
    started: float
    machine: str = ""

    @classmethod
    def myself(cls) -> "Holder":
        return cls(os.getpid(), socket.gethostname(), psutil.Process().create_time(), _machine())

    @classmethod
    def from_text(cls, text: str) -> "Holder":
        """Raises TypeError or ValueError if the text is no lock's."""
        holder = cls(**parse_json(text))
        if not (
            type(holder.pid) is int
            and isinstance(holder.host, str)
            and isinstance(holder.started, int | float)
            and isinstance(holder.machine, str)
        ):
            raise TypeError("an entry has the wrong type")
        if not (0 < holder.pid < LARGEST_ENTRY and 0 <= holder.started < LARGEST_ENTRY):
            raise ValueError("an entry is out of range")
        return holder

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended; of other machines that is not known."""
        if not self.host:
            return True
        if self.is_elsewhere:
            return False
        try:
            process = psutil.Process(self.pid)
            differs = abs(process.create_time() - self.started) > CLOCK_TOLERANCE
            return differs or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is a process of another machine."""
        mine = _machine()
        return self.machine != mine if self.machine and mine else self.host != socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {datetime.fromtimestamp(self.started):%Y-%m-%d %H:%M:%S}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds an output folder, which is made if it is missing, for the processes of one run. All of them must call it.

    Rank 0 locks, and the others learn whether it could. The lock of a process that has ended is taken over; whether one of
    another machine has takes up to three minutes to see. A folder that was made here and is empty in the end is removed.

    Raises:
        OSError: If a run holds the folder, or it cannot be written to.
    """
    with _held(folder) if is_first() else _told():
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    is_new, refusal = not folder.exists(), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder / LOCK_FILE)
    except OSError as error:
        refusal = error
    if world_size() > 1:
        torch.distributed.broadcast_object_list([str(refusal) if refusal else None], src=0)
    if refusal:
        raise refusal
    ended, mine = Event(), _text(folder / LOCK_FILE)
    Thread(target=_beat, args=(folder / LOCK_FILE, mine, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _text(folder / LOCK_FILE) == mine:  # a process that was suspended may have lost it
            (folder / LOCK_FILE).unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _beat(path: Path, text: str | None, ended: Event) -> None:
    """Touches a lock until its run has ended, as long as it is this run's."""
    while not ended.wait(BEAT):
        with suppress(OSError):  # the file system may be out of reach for a while
            if _text(path) == text:
                os.utime(path)


@contextmanager
def _told() -> Iterator[None]:
    refusal: list[str | None] = [None]
    torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0]:
        raise OSError(refusal[0])
    yield


def _claim(path: Path) -> None:
    """Creates the lock file; raises OSError if another process holds it."""
    while True:
        try:
            with open(path, "x") as file:
                json.dump(asdict(Holder.myself()), file)
            return
        except FileExistsError:
            holder, text = _read(path)
        if holder is not None and not (holder.is_gone or (holder.is_elsewhere and _falls_silent(path, holder))):
            raise OSError(
                f"another run writes to {path.parent} ({holder}): wait for its end, or choose another --output-dir"
            )
        if holder is not None:
            # Of several processes that found the lock stale, one removes it, and only while it is the one that was read.
            removal = path.with_name(f"{path.name}.removal")
            _claim(removal)
            try:
                if _text(path) == text:
                    path.unlink()
            finally:
                removal.unlink()


def _falls_silent(path: Path, holder: Holder) -> bool:
    """Waits for the next heartbeat of another machine's lock; False if there is one, True after a long silence."""
    last, told = None, False
    while True:
        try:
            with tempfile.TemporaryFile(dir=path.parent) as now:
                beat, silence = path.stat().st_mtime, os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
        except FileNotFoundError:  # it was released
            return True
        if silence > SILENCE:
            return True
        if last is not None and beat != last:
            return False
        if not told:
            print(f"{path} is of {holder}: waiting up to {SILENCE - silence:.0f} seconds to see whether that run lives")
        last, told = beat, True
        time.sleep(BEAT / 20)


def _machine() -> str:
    """The running kernel and the namespace of its process numbers; empty where the system does not name them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read(path: Path) -> tuple[Holder | None, str | None]:
    """The holder of a lock, and the text of the lock; None if it was released meanwhile."""
    patience = time.monotonic() + WRITING_TIME
    while (text := _text(path)) is not None:
        try:
            return Holder.from_text(text), text
        except (TypeError, ValueError):
            if time.monotonic() > patience:  # its process was killed while it created it
                return Holder(0, "", 0.0), text
            time.sleep(0.05)
    return None, None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
