"""What the turbofits of this machine are about to take, so that two never count the same memory.

A folder that all users share holds one lock, taken while somebody measures and plans, and one lease
for each turbofit that launched something. A lease counts while its owner holds a lock on it, which
the kernel drops however the owner ends, in containers too that share the folder. Without a folder
that can be written, launches go on alone and say so. `counted` is the machine as a launch counts
it; `end_orphans` ends what dead turbofits have left on it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.machine import Holder
from turbofit.core.process.files import lock_soon, write_atomic
from turbofit.core.process.variables import variables
from turbofit.core.struct import Struct, to_json
from turbofit.launch.engine.kernel import group_of, members, start_time
from turbofit.planning.examine.cards import open_margin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turbofit.core.machine import Gpu, Machine
    from turbofit.core.plan import Plan

#: Shared on purpose, and at one place whatever TMPDIR says; see `_open_folder`.
_FOLDER: Final = "/tmp/turbofit-leases"
_WAIT_SECONDS: Final = 300.0
#: Seconds in which orphans are to end.
_END_SECONDS: Final = 5.0
#: Turbofits of all users must see each other, whatever the umask of each.
_ALL_READ: Final = 0o644
#: No link is followed, and no pipe waited for.
_TO_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: Bytes of a lease, at most: one with a hundred GPUs has 30,000.
_LARGEST: Final = 1 << 20
#: Bytes by GPU UUID, from 0 to below 2**62.
Sizes = dict[str, Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]]


def leases_folder() -> Path:
    """Where turbofits meet, or ``TURBOFIT_LEASES``; a `UsageError` where that is no such folder."""
    return variables().leases or Path(_FOLDER)


class Lease(Struct, tag_field="schema", tag="turbofit.lease/1"):
    """What one turbofit holds or will hold, as its file says it.

    ``need`` are bytes by GPU UUID that its engines take at most, its margin included; ``growth``
    what they may still take once they are ready. ``larger``: their caches may be larger than in the
    plan. ``engines`` are (pid, start time), where ``pid_namespace`` numbers them. Whoever reads the
    file finds out ``path`` and ``uid``, its owner, -1 where that is unclear.
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
        """Whether a process belongs to one of its engines."""
        group = group_of(pid)
        return any(engine in (pid, group) for engine, _ in self.engines)

    @property
    def here(self) -> bool:
        """Whether its engines are numbered as the processes that we see are."""
        return self.pid_namespace == _pid_namespace()

    @property
    def settled(self) -> bool:
        """Whether its engines hold what they hold for good: all are ready, and none has ended.

        An engine's end is seen here before its turbofit says so, but not in another container.
        """
        if not self.ready or not self.here:
            return self.ready
        return all(start_time(pid) == began for pid, began in self.engines)


class Leases:
    """The folder, and our own lease in it. A context manager: at the end our lease goes.

    Raises:
        LaunchError: the folder is somebody's trap (a link, or not shared as it must be).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or leases_folder()
        self._mine = Lease()
        self._pid = os.getpid()
        self._name = f"{self._pid}-{time.monotonic_ns()}"
        self._lock: int | None = None
        #: Why launches go on alone, or None.
        self.alone = _open_folder(self._folder)
        #: The disk did not take our lease as it is now: `note` it again.
        self.unwritten = False

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def locked(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Nobody else measures and plans meanwhile; `waiting` is called once where somebody does.

        Raises:
            LaunchError: somebody has it for minutes.
        """
        if self.alone:
            yield
            return
        descriptor = _open_lock(self._folder / "lock")
        try:
            deadline = time.monotonic() + _WAIT_SECONDS
            locked = _try_lock(descriptor)
            if not locked:
                waiting()
            while not locked:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        "another turbofit has been planning for five minutes",
                        hint=f"see who holds {self._folder / 'lock'}: fuser -v on it",
                    )
                time.sleep(0.05)
                locked = _try_lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def others(self) -> list[Lease]:
        return [lease for lease, alive in self._all() if alive]

    def stale(self) -> list[Lease]:
        """Leases of our user whose owners are gone, and whose engines we would see."""
        gone = [lease for lease, alive in self._all() if not alive and lease.here]
        return [lease for lease in gone if lease.uid == os.getuid()]

    def reserve(self, plan: Plan) -> None:
        """Say what a plan's engines will take; those that were noted before are forgotten."""
        need = {gpu.uuid: gpu.most - gpu.used + open_margin(gpu) for gpu in plan.gpus}
        growth = {gpu.uuid: gpu.peak - gpu.steady + open_margin(gpu) for gpu in plan.gpus}
        self._write(Lease(model=plan.model.name, need=need, growth=growth))

    def note(self, engines: list[int], *, ready: bool, larger: bool = False) -> None:
        """Say which processes the engines are, and whether they hold what they hold for good.

        They do not where one has just ended, though its turbofit may not have seen that yet.
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
        """Every lease but ours, and whether its owner lives."""
        if self.alone:
            return
        for path in sorted(self._folder.glob("*.json")):
            if path.stem == self._name:
                continue
            with suppress(OSError, ValueError, RecursionError):
                yield _read(path), is_held(path.with_suffix(".lock"))


def _read(path: Path) -> Lease:
    """A lease, in a folder where anybody may put a pipe, a link or a file without end."""
    with os.fdopen(os.open(path, _TO_READ), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _LARGEST:
            raise OSError(path)
        # Anybody may have given our file a second name, whose lock nobody holds.
        uid = facts.st_uid if facts.st_nlink == 1 else -1
        lease = msgspec.json.decode(file.read(_LARGEST), type=Lease)
        return replace(lease, path=str(path), uid=uid)


@cache
def _pid_namespace() -> str:
    """What numbers the processes that we see, since this boot; empty where the kernel is silent."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.readlink('/proc/self/ns/pid')} {boot}"
    except OSError:
        return ""


def _open_folder(folder: Path) -> str | None:
    """Make the folder where it is missing; why it cannot be used, or None."""
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
    """Make a file that all may read, whatever the umask is."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, _ALL_READ)
    os.fchmod(descriptor, _ALL_READ)
    return descriptor


def _open_lock(path: Path) -> int:
    """The lock file, whoever made it: in such a folder the kernel lets no one create it again."""
    why = "it comes and goes"
    for _ in range(100):
        try:
            return os.open(path, _TO_READ)
        except FileNotFoundError:  # noqa: PERF203 - it is for this that we try again
            with suppress(FileExistsError):
                return _create(path)
        except OSError as exc:  # also one that was made just now, until all may read it
            why = exc.strerror or str(exc)
    raise LaunchError(
        f"{path} cannot be opened: {why}",
        hint="have its owner remove it, or name another folder with TURBOFIT_LEASES",
    )


def _locked(path: Path) -> int:
    """A new file, and locked. Over: on a file system without locks it counts so for ever."""
    descriptor = _create(path)
    try:
        lock_soon(descriptor)
    except TimeoutError:
        os.close(descriptor)
        path.unlink()  # it is made anew the next time
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
    """Whether somebody has this file locked; one that we may not read may be locked."""
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
    """The machine with what other turbofits will still take counted as used.

    Over where NVML does not show who holds memory: a lease counts whole until it is ready.
    """
    others = leases.others()
    if not others:
        return machine
    return replace(machine, gpus=tuple(_gpu(gpu, others) for gpu in machine.gpus))


def _gpu(gpu: Gpu, others: list[Lease]) -> Gpu:
    for lease in others:
        pending = _pending(gpu, lease)
        if pending and isinstance(gpu.used, int) and isinstance(gpu.free, int):
            name = f"turbofit, which reserved it for {lease.model}"
            gpu = replace(
                gpu,
                used=gpu.used + min(pending, gpu.free),
                free=max(0, gpu.free - pending),
                holders=(*gpu.holders, Holder(pid=lease.pid, name=name, bytes=pending)),
            )
    return gpu


def _pending(gpu: Gpu, lease: Lease) -> int:
    """Bytes that a lease's engines will still take on a GPU.

    Where their caches may be larger than in the plan, what they hold does not tell how far they
    have grown. Over there: by what they have grown already.
    """
    need = lease.need.get(gpu.uuid, 0)
    growth = lease.growth.get(gpu.uuid, need)
    holders = [h for h in gpu.holders if isinstance(h.pid, int) and lease.holds(h.pid)]
    known = [h.bytes for h in holders if isinstance(h.bytes, int)]
    if holders and len(known) == len(holders):
        return max(growth if lease.larger else 0, need - sum(known))
    return growth if lease.settled else need


def end_orphans(leases: Leases) -> list[str]:
    """End what engines of our user's dead turbofits left, and drop their leases; what was done."""
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
