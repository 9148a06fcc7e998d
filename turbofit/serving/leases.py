"""Records how much memory each turbofit here will take, so that no memory is planned twice.

A folder that all users share has one lock, which is held while a turbofit measures and plans, and
one lease for each turbofit that launched something. A lease counts while its owner holds a lock on
it, which the kernel drops when the owner ends, also in containers that share the folder. If the
folder cannot be written, launches go on without it and say so. `counted` is the machine as a launch
counts it; `end_orphans` ends the engines that dead turbofits left behind.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.machine import Gpu, Holder, Machine
from turbofit.core.plan import Plan
from turbofit.core.process.files import lock_soon, write_atomic
from turbofit.core.process.stat import group_of, members, start_time
from turbofit.core.process.variables import leases_folder
from turbofit.core.struct import Struct, to_json
from turbofit.planning.examine.cards import open_margin

#: The folder where ``TURBOFIT_LEASES`` names none. It is shared on purpose, and the same whatever
#: TMPDIR says; see `_open_folder`.
_FOLDER: Final = "/tmp/turbofit-leases"
_WAIT_SECONDS: Final = 300.0
#: Seconds in which orphaned engines must end.
_END_SECONDS: Final = 5.0
#: Turbofits of all users must read each other's files, whatever the umask of each is.
_ALL_READ: Final = 0o644
#: Flags for opening a lease: no symlinks, no blocking on a FIFO.
_TO_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: The most bytes of a lease: one with a hundred GPUs has 30,000.
_LARGEST: Final = 1 << 20
#: Bytes by GPU UUID, from 0 to below 2**62.
Sizes = dict[str, Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]]


class Lease(Struct, tag_field="schema", tag="turbofit.lease/1"):
    """The memory that one turbofit holds or will hold, as the lease's file says.

    ``need``: bytes by GPU UUID that the turbofit's engines take at most, with its margin;
    ``growth``: bytes that they may still take once they are ready. ``larger``: their caches may be
    larger than in the plan. ``engines`` are pairs of (pid, start time), with pids of
    ``pid_namespace``. The file does not contain ``path`` and the owner's ``uid``: they are filled
    in when it is read. ``uid`` is -1 if the owner is unclear.
    """

    pid: int = 0
    model: str = ""
    ready: bool = False
    need: Sizes = msgspec.field(default_factory=dict)
    growth: Sizes = msgspec.field(default_factory=dict)
    larger: bool = False
    pid_namespace: str = ""
    engines: tuple[tuple[Annotated[int, msgspec.Meta(gt=1)], int], ...] = ()
    path: str = ""
    uid: int = -1

    def holds(self, pid: int) -> bool:
        """Return whether a process belongs to an engine of this lease."""
        group = group_of(pid)
        return any(engine in (pid, group) for engine, _ in self.engines)

    @property
    def here(self) -> bool:
        """Whether the pids of the lease's engines belong to this process's namespace."""
        return self.pid_namespace == _pid_namespace()

    @property
    def settled(self) -> bool:
        """True if the lease's engines have all their memory: all are ready, and none has ended.

        The end of an engine in another container counts only once its turbofit has reported it.
        """
        if not self.ready or not self.here:
            return self.ready
        return all(start_time(pid) == began for pid, began in self.engines)


class Leases(AbstractContextManager["Leases"]):
    """The shared folder of leases with our own lease, which is removed at the context's end.

    Raises:
        LaunchError: the folder's path is a link or a file: somebody may have set a trap.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or leases_folder() or Path(_FOLDER)
        self._mine = Lease()
        self._pid = os.getpid()
        self._name = f"{self._pid}-{time.monotonic_ns()}"
        self._lock: int | None = None
        #: Why launches cannot use the folder, or None.
        self.alone = _open_folder(self._folder)
        #: Whether the disk has refused our current lease: `note` writes it again.
        self.unwritten = False

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def locked(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock for measuring and planning; call ``waiting`` once if it is taken.

        If the folder cannot be used (``alone``), no lock is taken.

        Raises:
            LaunchError: another process has held the lock for five minutes.
        """
        if self.alone:
            yield
            return
        descriptor = _open_lock(self._folder / "lock")
        try:
            if not _try_lock(descriptor):
                waiting()
                try:
                    lock_soon(descriptor, _WAIT_SECONDS)
                except OSError:
                    raise LaunchError(
                        "another turbofit has been planning for five minutes",
                        hint=f"see who holds {self._folder / 'lock'}: fuser -v on it",
                    ) from None
            yield
        finally:
            os.close(descriptor)

    def others(self) -> list[Lease]:
        return [lease for lease, alive in self._all() if alive]

    def stale(self) -> list[Lease]:
        """Return our user's leases whose turbofits have ended, with engines in our namespace."""
        gone = [lease for lease, alive in self._all() if not alive and lease.here]
        return [lease for lease in gone if lease.uid == os.getuid()]

    def reserve(self, plan: Plan) -> None:
        """Write a new lease for a plan whose engines will start; the lease names no engines yet."""
        need = {gpu.uuid: gpu.most - gpu.used + open_margin(gpu) for gpu in plan.ledgers}
        growth = {gpu.uuid: gpu.peak - gpu.steady + open_margin(gpu) for gpu in plan.ledgers}
        self._write(Lease(model=plan.model.name, need=need, growth=growth))

    def note(self, engines: list[int], *, ready: bool, larger: bool = False) -> None:
        """Write the engines' process ids, and whether they have taken all their memory (``ready``).

        If an engine has just ended, the lease is not ready, even if the supervisor has not noticed
        yet.
        """
        started = [(pid, start_time(pid)) for pid in engines]
        alive = tuple(pair for pair in started if pair[1])
        ready = ready and len(alive) == len(engines)
        lease = replace(self._mine, engines=alive, ready=ready, larger=larger)
        if lease != self._mine or self.unwritten:
            self._write(lease)

    def drop(self, lease: Lease) -> None:
        path = Path(lease.path)
        for file in (path, path.with_suffix(".lock")):
            with suppress(OSError):
                file.unlink()

    def close(self) -> None:
        """Remove our own lease; a fork of our process leaves it alone."""
        if self._lock is None:
            return
        for suffix in (".json", ".lock") if os.getpid() == self._pid else ():
            with suppress(OSError):
                (self._folder / f"{self._name}{suffix}").unlink()
        os.close(self._lock)
        self._lock, self._mine = None, Lease()

    def _write(self, lease: Lease) -> None:
        if self.alone:
            return
        self._mine = replace(lease, pid=os.getpid(), pid_namespace=_pid_namespace())
        self.unwritten = True
        with suppress(OSError, UsageError):
            if self._lock is None:
                self._lock = _locked(self._folder / f"{self._name}.lock")
            path = self._folder / f"{self._name}.json"
            write_atomic(path, to_json(self._mine), mode=_ALL_READ)
            self.unwritten = False

    def _all(self) -> Iterator[tuple[Lease, bool]]:
        """Yield every lease but ours, and whether its owner still runs."""
        if self.alone:
            return
        for path in sorted(self._folder.glob("*.json")):
            if path.stem == self._name:
                continue
            with suppress(OSError, ValueError, RecursionError):
                yield _read(path), is_held(path.with_suffix(".lock"))


def _read(path: Path) -> Lease:
    """Read a lease safely: in this folder anybody may put a pipe, a link or an endless file."""
    with os.fdopen(os.open(path, _TO_READ), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _LARGEST:
            raise OSError(path)
        # Anybody may have given a file a second name, whose lock nobody holds.
        uid = facts.st_uid if facts.st_nlink == 1 else -1
        lease = msgspec.json.decode(file.read(_LARGEST), type=Lease)
        return replace(lease, path=str(path), uid=uid)


@cache
def _pid_namespace() -> str:
    """Return the pid namespace of this process and this boot; empty if the kernel does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.readlink('/proc/self/ns/pid')} {boot}"
    except OSError:
        return ""


def _open_folder(folder: Path) -> str | None:
    """Make the folder if it is missing; returns why it cannot be used, or None."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
            os.chmod(folder, 0o1777)
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode):
            raise LaunchError(
                f"{folder} is no folder: launches of this machine meet there",
                hint="remove it, or name another with TURBOFIT_LEASES",
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{folder} cannot be written"
    except OSError as exc:
        return f"{folder} cannot be made: {exc.strerror or exc}"
    return None


def _create(path: Path) -> int:
    """Create a file that all users may read, whatever the umask is; returns its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, _ALL_READ)
    os.fchmod(descriptor, _ALL_READ)
    return descriptor


def _open_lock(path: Path) -> int:
    """Open the lock file, or create it if it is missing; return its descriptor.

    It is not opened with O_CREAT: in a folder that users share this fails on another user's file.
    """
    why = "it comes and goes"
    for _ in range(100):
        try:
            return os.open(path, _TO_READ)
        except FileNotFoundError:  # noqa: PERF203 - the loop exists to try again
            with suppress(FileExistsError):
                return _create(path)
        except OSError as exc:  # also of a file made just now, until all may read it
            why = exc.strerror or str(exc)
    raise LaunchError(
        f"{path} cannot be opened: {why}",
        hint="have its owner remove it, or name another folder with TURBOFIT_LEASES",
    )


def _locked(path: Path) -> int:
    """Create a file, lock it, and return its descriptor.

    On a file system without locks the file stays unlocked, so its lease counts for ever.
    """
    descriptor = _create(path)
    try:
        lock_soon(descriptor)
    except TimeoutError:
        os.close(descriptor)
        path.unlink()  # the next call makes it again
        raise
    except OSError:
        pass
    return descriptor


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_held(path: Path) -> bool:
    """Return whether a process has locked a file; True if we may not read it."""
    try:
        descriptor = os.open(path, _TO_READ)
    except PermissionError:
        return True
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)  # others may look at the same time
    except OSError:
        return True
    finally:
        os.close(descriptor)


def counted(machine: Machine, leases: Leases) -> Machine:
    """Return the machine, with the memory that other turbofits will still take counted as used.

    Too much is counted if NVML does not show who holds memory: until a lease's engines are ready,
    the whole lease is then added to what they already use.
    """
    others = leases.others()
    return replace(machine, gpus=tuple(_gpu(gpu, others) for gpu in machine.gpus))


def _gpu(gpu: Gpu, others: list[Lease]) -> Gpu:
    """Return the GPU; memory that other turbofits will still take of it is counted as used."""
    for lease in others:
        pending = _pending(gpu, lease)
        if pending and isinstance(gpu.used, int) and isinstance(gpu.free, int):
            name = f"turbofit, which reserved it for {lease.model} (see turbofit ps)"
            gpu = replace(
                gpu,
                used=gpu.used + min(pending, gpu.free),
                free=max(0, gpu.free - pending),
                holders=(*gpu.holders, Holder(pid=lease.pid, name=name, bytes=pending)),
            )
    return gpu


def _pending(gpu: Gpu, lease: Lease) -> int:
    """Return the bytes that a lease's engines will still take on a GPU.

    If their caches may be larger than planned, the bytes in use do not show how much of the
    possible growth has happened. The result is then too large by that growth.
    """
    need = lease.need.get(gpu.uuid, 0)
    growth = lease.growth.get(gpu.uuid, need)
    holders = [h for h in gpu.holders if isinstance(h.pid, int) and lease.holds(h.pid)]
    known = [h.bytes for h in holders if isinstance(h.bytes, int)]
    if holders and len(known) == len(holders):
        return max(growth if lease.larger else 0, need - sum(known))
    return growth if lease.settled else need


def end_orphans(leases: Leases) -> list[str]:
    """End the engines that our user's dead turbofits left, drop their leases; returns messages."""
    done = []
    for lease in leases.stale():
        for pid, started in lease.engines:
            left = members(pid, started)
            if left:
                _end(pid, started)
                done.append(
                    f"ended {len(left)} processes that an engine for {lease.model} had left behind "
                    f"when turbofit, process {lease.pid}, was killed"
                )
        leases.drop(lease)
    return done


def _end(group: int, started: int) -> None:
    deadline = time.monotonic() + _END_SECONDS
    while members(group, started) and time.monotonic() < deadline:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.05)
