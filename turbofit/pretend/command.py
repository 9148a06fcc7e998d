"""A command on a pretend machine: its environment, its signals, and nothing of it stays behind."""

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
from turbofit.pretend.libraries import ACCOUNT, family_of

_FORWARDED: Final = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37
_PR_SET_PDEATHSIG: Final = 1  # even where this process is killed, its command does not stay
_GRACE: Final = 3.0
#: What a terminal sends to each process in its foreground.
_OF_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)
#: Names the scenario file to the C side.
SCENARIO = "TURBOFIT_PRETEND_SCENARIO"
#: Variables that would show a child another machine.
_HIDING = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_")
#: Variables that change what an engine allocates: a rehearsal is of the plan's settings only.
CHANGING = ("CUDA_", "TM_", "NCCL_", "LMDEPLOY_", "PYTORCH_")
#: Modules that Python finds first in a process with a CUDA build of torch.
_INSIDE = Path(__file__).parent / "inside"


def run_command(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    stdout: int | IO[bytes] | None = None,
    every: float = 3600.0,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Runs a command to its end, ends what it left behind, and returns the exit status.

    The status is negative for a signal. ``env`` is the whole environment; ``tick`` is called every
    ``every`` seconds. Orphans come to this process (it is their subreaper meanwhile), even where
    they began a session of their own; they get SIGTERM, and SIGKILL three seconds later. Where this
    process has other threads, which may start children too, only orphans with the command's
    scenario count.

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
            preexec_fn=begin,  # noqa: PLW1509 - nothing else runs in this process
        )
    except OSError as exc:
        raise UsageError(
            f"{command[0]} cannot be run: {exc.strerror or exc}",
            hint="after -- comes a program with its arguments, as in a shell without quotes",
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
    """Whether a terminal's Ctrl-C comes to this process, and so to its command too."""
    with contextlib.suppress(OSError), open("/dev/tty") as terminal:
        return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    return False


@contextlib.contextmanager
def _forwarding(pid: int) -> Iterator[None]:
    """Passes signals on, where the terminal does not; only the main thread may set handlers."""

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
    """Ends all descendants but ``others``, zombies too; with a ``scenario`` only those on it."""
    ours = {process.pid}
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE
        signalled: set[int] = set()
        while time.monotonic() < deadline:
            process.poll()
            new = set(_descendants(os.getpid())) - others
            ours |= {pid for pid in new if scenario is None or _is_on(pid, scenario)}
            left = new & ours  # one that has ended tells of no scenario any more
            if not left:
                return
            for pid in left:
                with contextlib.suppress(OSError):
                    if pid not in signalled:
                        os.kill(pid, number)
                    if pid != process.pid:
                        os.waitpid(pid, os.WNOHANG)
            signalled |= left
            time.sleep(0.01)


def _is_on(pid: int, scenario: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{SCENARIO}={scenario}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def _descendants(pid: int) -> Iterator[int]:
    """Every process below one, zombies too."""
    below: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
                below.setdefault(parent, []).append(int(entry))
    waiting = [pid]
    while waiting:
        for child in below.get(waiting.pop(), []):
            waiting.append(child)
            yield child


def cuda_site() -> Path | None:
    """The folder of packages of this Python, if its torch is a CUDA build; None otherwise."""
    spec = importlib.util.find_spec("torch")
    return site_with(spec.origin) if spec and spec.origin else None


def site_with(torch: str) -> Path | None:
    folder = Path(torch).parent
    return folder.parent if (folder / "lib" / "libtorch_cuda.so").exists() else None


def pretend_environment(
    libraries: Path,
    scenario: Path,
    base: Mapping[str, str] | None = None,
    *,
    site: Path | None = None,
    keep: bool = False,
) -> dict[str, str]:
    """The environment for a child process on a pretend machine.

    ``site``: the folder of packages of the child's Python, if its torch is a CUDA build. Such a
    torch finds NVIDIA's libraries by their paths, so the pretend ones are loaded before everything
    else, and the child never reaches the real driver. ``keep``: keep variables that change what
    programs allocate (``PYTORCH_CUDA_ALLOC_CONF``).
    """
    source = os.environ if base is None else base
    dropped = _HIDING if keep else (*_HIDING, *CHANGING)
    env = {k: v for k, v in source.items() if not k.startswith(dropped)}
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
    """Let a child import this turbofit, after what is on its path already."""
    package = str(Path(__file__).resolve().parents[2])
    before = env.get("PYTHONPATH")
    env["PYTHONPATH"] = f"{before}:{package}" if before else package


def put_first(env: dict[str, str], name: str, first: str, separator: str = ":") -> None:
    rest = env.get(name)
    env[name] = f"{first}{separator}{rest}" if rest else first
