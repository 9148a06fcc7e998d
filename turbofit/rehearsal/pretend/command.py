"""Runs a command on a pretend machine, passes signals to the command, and ends its processes."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Final

from turbofit.core.errors import UsageError
from turbofit.core.process.processes import every_stat
from turbofit.core.units import grouped
from turbofit.rehearsal.pretend.libraries import ACCOUNT, family_of

_FORWARDED: Final = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37
_PR_SET_PDEATHSIG: Final = 1  # the kernel ends the command when this process ends or is killed
_GRACE: Final = 3.0
#: Signals that a terminal sends to all processes in its foreground.
_OF_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)
#: The variable by which the libraries in C find the scenario file.
SCENARIO = "TURBOFIT_PRETEND_SCENARIO"
#: Beginnings of environment variables that hide GPUs or change their order.
_HIDING = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_")
#: Beginnings of environment variables that change an engine's allocations. An engine of a plan gets
#: such variables from the plan, not from this process.
CHANGING = ("CUDA_", "TM_", "NCCL_", "LMDEPLOY_", "PYTORCH_")
#: The folder whose modules Python finds first, in processes with a CUDA build of torch.
_INSIDE = Path(__file__).parent / "inside"


def run_command(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    stdout: int | IO[bytes] | None = None,
    every: float = 3600.0,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Run a command to its end, end the processes that it left, and return the exit status.

    The status is negative after a signal. ``env`` is the whole environment of the command. ``tick``
    is called every ``every`` seconds. As a subreaper, this process inherits the orphans of the
    command, even from other sessions. Orphans get SIGTERM, and SIGKILL three seconds later. If this
    process has several threads, only orphans with the command's scenario are ended: another thread
    may have started other orphans.

    Raises:
        UsageError: the command cannot be run.
    """
    others = set(_descendants(os.getpid()))
    libc, reaped = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(reaped), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    scenario = env.get(SCENARIO) if threading.active_count() > 1 else None

    def begin() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    try:
        process = subprocess.Popen(
            list(command),
            env=dict(env),
            stdout=stdout,
            preexec_fn=begin,  # noqa: PLW1509 - it only calls prctl
        )
    except OSError as exc:
        raise UsageError(
            f"{command[0]} cannot be run: {exc.strerror or exc}",
            hint="write a program and its arguments after --, as in a shell without quotes",
        ) from None
    try:
        with _forwarding(process.pid):
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(every)
                tick()
    finally:
        _end(process, others, scenario)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, reaped.value, 0, 0, 0)


def _in_foreground() -> bool:
    """Return whether a terminal's Ctrl-C reaches this process; then it reaches the command, too."""
    with contextlib.suppress(OSError), open("/dev/tty") as terminal:
        return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    return False


@contextlib.contextmanager
def _forwarding(pid: int) -> Iterator[None]:
    """Pass signals of this process on to process ``pid``.

    A signal that the terminal sends to both processes is not passed on. Outside the main thread no
    signal is passed on, since Python sets signal handlers only in the main thread.
    """

    def forward(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number not in _OF_TERMINAL or not _in_foreground():
                os.kill(pid, number)

    taken = _FORWARDED if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, forward) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes], others: set[int], scenario: str | None) -> None:
    """End all descendants except ``others``; with ``scenario``, only those on this scenario."""
    descendants = {process.pid}
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE
        signalled: set[int] = set()
        while time.monotonic() < deadline:
            process.poll()
            new = set(_descendants(os.getpid())) - others
            descendants |= {pid for pid in new if scenario is None or _is_on(pid, scenario)}
            # A process that has just ended shows no environment, so earlier findings count, too.
            alive = new & descendants
            if not alive:
                return
            for pid in alive:
                with contextlib.suppress(OSError):
                    if pid not in signalled:
                        os.kill(pid, number)
                    if pid != process.pid:
                        os.waitpid(pid, os.WNOHANG)
            signalled |= alive
            time.sleep(0.01)


def _is_on(pid: int, scenario: str) -> bool:
    """Return whether a process has this scenario in its environment."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{SCENARIO}={scenario}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def _descendants(pid: int) -> Iterator[int]:
    """Yield the ids of all descendants of a process, including zombies."""
    below = grouped((int(fields[1]), other) for other, fields in every_stat())
    waiting = [pid]
    while waiting:
        for child in below.get(waiting.pop(), []):
            waiting.append(child)
            yield child


def cuda_site() -> Path | None:
    """Return this Python's ``site-packages`` folder if its torch is a CUDA build, else None."""
    spec = importlib.util.find_spec("torch")
    return site_with(spec.origin) if spec and spec.origin else None


def site_with(torch: str) -> Path | None:
    """Return the ``site-packages`` folder of the torch at a path; None if torch is a CPU build."""
    folder = Path(torch).parent
    return folder.parent if (folder / "lib" / "libtorch_cuda.so").exists() else None


def pretend_environment(
    libraries: Path,
    scenario: Path,
    base: Mapping[str, str] | None = None,
    *,
    site: Path | None = None,
) -> dict[str, str]:
    """Make the environment for a child process on a pretend machine.

    ``site`` is the ``site-packages`` folder of the child's Python, if its torch is a CUDA build. A
    CUDA build finds NVIDIA's libraries by their paths. So the child preloads the pretend libraries,
    and never reaches the real driver. Variables that change how programs allocate, such as
    ``PYTORCH_CUDA_ALLOC_CONF``, are kept; see `CHANGING`.
    """
    source = os.environ if base is None else base
    env = {k: v for k, v in source.items() if not k.startswith(_HIDING)}
    put_first(env, "LD_LIBRARY_PATH", str(libraries))
    env[SCENARIO] = str(scenario)
    env["TURBOFIT_PRETEND_LIBRARIES"] = str(libraries)
    if site is not None:
        every = (path for path in libraries.iterdir() if path.suffix[1:].isdigit())
        names = sorted(path.name for path in every if family_of(path.name) is not None)
        loaded = " ".join(str(libraries / name) for name in (ACCOUNT, *names))
        put_first(env, "LD_PRELOAD", loaded, " ")
        put_first(env, "PYTHONPATH", str(_INSIDE))
        env["TRITON_LIBCUDA_PATH"] = str(libraries)
    return env


def find_turbofit(env: dict[str, str]) -> None:
    """Add the folder of this turbofit to the end of a child's ``PYTHONPATH``."""
    package = str(Path(__file__).resolve().parents[3])
    before = env.get("PYTHONPATH")
    env["PYTHONPATH"] = f"{before}:{package}" if before else package


def put_first(env: dict[str, str], name: str, first: str, separator: str = ":") -> None:
    """Put a value before all others in a variable that lists values."""
    rest = env.get(name)
    env[name] = f"{first}{separator}{rest}" if rest else first
