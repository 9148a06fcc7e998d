"""Records how much memory each turbofit here will take, so that no memory is planned twice.

All users share a folder with a lock and leases. A turbofit holds the lock while it measures and
plans, and has a lease for the engines that it launched. A lease counts while its owner locks the
lease's lock file. The kernel drops this lock when the owner ends, also in containers that share the
folder. If the folder cannot be written, launches continue without leases, with a warning. `counted`
subtracts the leases of others from a machine; `end_orphans` ends engines of dead turbofits.
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
from turbofit.core.messages import plural
from turbofit.core.plan import Plan
from turbofit.core.process.files import lock_soon, write_atomic
from turbofit.core.process.processes import start_time
from turbofit.core.process.variables import leases_folder
from turbofit.core.struct import Struct, to_json
from turbofit.planning.examine.cards import open_margin
from turbofit.serving.process.child import group_of, members
from turbofit.serving.runs import live_servers

#: The folder without ``TURBOFIT_LEASES``. All users share the folder, so TMPDIR does not change it;
#: see `_open_folder`.
_FOLDER: Final = "/tmp/turbofit-leases"
_WAIT_SECONDS: Final = 300.0
#: Seconds in which orphaned engines must end.
_END_SECONDS: Final = 5.0
#: The mode of files, which turbofits of all users read, whatever a user's umask is.
_ALL_READ: Final = 0o644
#: Flags for opening a lease: no symlinks, no blocking on a FIFO.
_TO_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: The beginning of the UUIDs that a SPEC gives its pretend GPUs.
_PRETEND: Final = "preset-"
#: The most bytes of a lease; a lease of a hundred GPUs has 30,000 bytes.
_LARGEST: Final = 1 << 20
#: Bytes by GPU UUID, from 0 to below 2**62.
Sizes = dict[str, Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]]


class Lease(Struct, tag_field="schema", tag="turbofit.lease/1"):
    """The memory that one turbofit holds or will hold; a file contains this record.

    ``need``: the most bytes of the turbofit's engines by GPU UUID, with the margin. ``growth``: the
    most bytes that ready engines may still take. ``larger``: the engines' caches may be larger than
    in the plan. ``engines`` are pairs of (pid, start time), with pids of ``pid_namespace``.
    ``path`` and ``uid``, the file's owner, are set when the file is read. ``uid`` is -1 if the
    owner is unclear.
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
        """True if the lease's engines have all their memory: all engines are ready and alive.

        The end of an engine in another container counts when that engine's turbofit reports it.
        """
        if not self.ready or not self.here:
            return self.ready
        return all(start_time(pid) == began for pid, began in self.engines)


class Leases(AbstractContextManager["Leases"]):
    """The shared folder of leases, and our own lease; the end of the context removes our lease.

    Raises:
        LaunchError: the folder's path is a link or a file, which may be a trap.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or leases_folder() or Path(_FOLDER)
        self._mine = Lease()
        self._pid = os.getpid()
        self._name = f"{self._pid}-{time.monotonic_ns()}"
        #: The descriptor of our lease's lock file, None without a lease.
        self._lock: int | None = None
        #: Why launches cannot use the folder, or None.
        self.alone = _open_folder(self._folder)
        #: Whether a full disk has refused our lease, so that `note` must write the lease again.
        self.unwritten = False

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def locked(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lock for measuring and planning; call ``waiting`` before a wait for the lock.

        If the folder cannot be used (``alone``), there is no lock.

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
                        hint=f"fuser -v {self._folder / 'lock'} shows the process",
                    ) from None
            yield
        finally:
            os.close(descriptor)

    def others(self) -> list[Lease]:
        return [lease for lease, alive in self._all() if alive]

    def stale(self) -> list[Lease]:
        """Return our user's leases of ended turbofits, with engines in our pid namespace."""
        gone = [lease for lease, alive in self._all() if not alive and lease.here]
        return [lease for lease in gone if lease.uid == os.getuid()]

    def reserve(self, plan: Plan) -> None:
        """Write a new lease for a plan whose engines will start; the lease has no engines yet."""
        need = {gpu.uuid: gpu.most - gpu.used + open_margin(gpu) for gpu in plan.ledgers}
        growth = {gpu.uuid: gpu.peak - gpu.steady + open_margin(gpu) for gpu in plan.ledgers}
        self._write(Lease(model=plan.model.name, need=need, growth=growth))

    def note(self, engines: list[int], *, ready: bool, larger: bool = False) -> None:
        """Write the engines' process ids to the lease; ``ready`` engines have all their memory.

        If an engine has just ended, the lease is not ready, even before the supervisor notices.
        """
        started = [(pid, start_time(pid)) for pid in engines]
        alive = tuple(pair for pair in started if pair[1])
        ready = ready and len(alive) == len(engines)
        lease = replace(self._mine, engines=alive, ready=ready, larger=larger)
        if lease != self._mine or self.unwritten:
            self._write(lease)

    def close(self) -> None:
        """Remove our own lease; do nothing in a fork of our process."""
        if self._lock is None:
            return
        if os.getpid() == self._pid:
            _remove(self._folder / f"{self._name}.json")
        os.close(self._lock)
        self._lock, self._mine = None, Lease()

    def _write(self, lease: Lease) -> None:
        """Make this lease ours, and write the lease; a full disk sets `unwritten`."""
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
        """Yield each lease of others, and whether the lease's owner still runs."""
        if self.alone:
            return
        for path in sorted(self._folder.glob("*.json")):
            if path.stem == self._name:
                continue
            with suppress(OSError, ValueError, RecursionError):
                yield _read(path), is_held(path.with_suffix(".lock"))


def _read(path: Path) -> Lease:
    """Read a lease safely: anybody may put a pipe, a link or an endless file into the folder."""
    with os.fdopen(os.open(path, _TO_READ), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _LARGEST:
            raise OSError(path)
        # Anybody can give our lease a second name, under which no lock shows that we still run.
        uid = facts.st_uid if facts.st_nlink == 1 else -1
        lease = msgspec.json.decode(file.read(_LARGEST), type=Lease)
        return replace(lease, path=str(path), uid=uid)


@cache
def _pid_namespace() -> str:
    """Return the ids of this process's pid namespace and of this boot; empty if unreadable."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.readlink('/proc/self/ns/pid')} {boot}"
    except OSError:
        return ""


def _open_folder(folder: Path) -> str | None:
    """Make a missing folder; return why the folder cannot be used, or None."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
            os.chmod(folder, 0o1777)
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode):
            raise LaunchError(
                f"{folder} is no folder, and turbofit needs a folder there",
                hint=f"remove {folder}, or name another folder with TURBOFIT_LEASES",
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{folder} cannot be written"
    except OSError as exc:
        return f"{folder} cannot be made: {exc.strerror or exc}"
    return None


def _create(path: Path) -> int:
    """Create a file that all users may read, whatever the umask is; return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, _ALL_READ)
    os.fchmod(descriptor, _ALL_READ)
    return descriptor


def _remove(lease: Path) -> None:
    """Remove the files of a lease."""
    for file in (lease, lease.with_suffix(".lock")):
        with suppress(OSError):
            file.unlink()


def _open_lock(path: Path) -> int:
    """Open or create the lock file; return the descriptor.

    O_CREAT is not used: in a shared folder, O_CREAT fails on another user's file.
    """
    why = "the file appears and disappears"
    for _ in range(100):
        try:
            return os.open(path, _TO_READ)
        except FileNotFoundError:  # noqa: PERF203 - the loop exists to try again
            with suppress(FileExistsError):
                return _create(path)
        except OSError as exc:  # for example, a new file that only its owner may read so far
            why = exc.strerror or str(exc)
    raise LaunchError(
        f"{path} cannot be opened: {why}",
        hint=f"have the owner of {path} remove it, or name another folder with TURBOFIT_LEASES",
    )


def _locked(path: Path) -> int:
    """Create and lock a file; return the descriptor.

    A file system without locks leaves the file unlocked; the file's lease then counts for ever.
    """
    descriptor = _create(path)
    try:
        lock_soon(descriptor)
    except TimeoutError:
        os.close(descriptor)
        path.unlink()  # the next call makes the file again
        raise
    except OSError:
        pass
    return descriptor


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file; return False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_held(path: Path) -> bool:
    """Return whether a process has locked a file; True if we may not read the file."""
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
    """Return the machine; memory that other turbofits will still take counts as used.

    If NVML does not show which processes hold memory, too much is counted: the whole lease of
    engines that are not ready is added to the memory that these engines already use.
    """
    others = leases.others()
    servers = {server.record.pid: server.name for server in live_servers()} if others else {}
    gpus = tuple(_with_reserved(gpu, others, servers) for gpu in machine.gpus)
    return replace(machine, gpus=gpus)


def _with_reserved(gpu: Gpu, others: list[Lease], servers: dict[int, str]) -> Gpu:
    """Return the GPU; memory of the GPU that other turbofits will still take counts as used.

    ``servers`` has the run of each process that `turbofit stop` ends.
    """
    for lease in others:
        pending = _still_to_take(gpu, lease)
        if pending and isinstance(gpu.used, int) and isinstance(gpu.free, int):
            run = servers.get(lease.pid) if lease.here else None
            ways = [f"turbofit stop {run} ends it"] if run else []
            if gpu.uuid.startswith(_PRETEND):
                ways.append("another --on SPEC is another machine")
            name = f"turbofit's run of {lease.model}" + (f" ({'; '.join(ways)})" if ways else "")
            gpu = replace(
                gpu,
                used=gpu.used + min(pending, gpu.free),
                free=max(0, gpu.free - pending),
                holders=(*gpu.holders, Holder(pid=lease.pid, name=name, bytes=pending)),
            )
    return gpu


def _still_to_take(gpu: Gpu, lease: Lease) -> int:
    """Return the bytes that a lease's engines will still take on a GPU.

    If the caches may be larger than planned, the bytes in use do not show how much the engines have
    grown. The result may then be too large by the whole growth.
    """
    need = lease.need.get(gpu.uuid, 0)
    growth = lease.growth.get(gpu.uuid, need)
    holders = [h for h in gpu.holders if isinstance(h.pid, int) and lease.holds(h.pid)]
    known = [h.bytes for h in holders if isinstance(h.bytes, int)]
    if holders and len(known) == len(holders):  # NVML shows what each of the engines holds
        return max(growth if lease.larger else 0, need - sum(known))
    return growth if lease.settled else need


def end_orphans(leases: Leases) -> list[str]:
    """End the engines of our user's dead turbofits, remove their leases, and return messages."""
    done = []
    for lease in leases.stale():
        for pid, started in lease.engines:
            left = members(pid, started)
            if left:
                _end(pid, started)
                done.append(
                    f"ended {len(left)} {plural(len(left), 'process')} of an engine for"
                    f" {lease.model}, whose turbofit (process {lease.pid}) was killed"
                )
        _remove(Path(lease.path))
    return done


def _end(group: int, started: int) -> None:
    """Kill a process group, and wait until its processes have ended."""
    deadline = time.monotonic() + _END_SECONDS
    while members(group, started) and time.monotonic() < deadline:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.05)
