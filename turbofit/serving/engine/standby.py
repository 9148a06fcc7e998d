"""Keeps a process that has imported an engine's modules, and becomes an engine when it is told to.

Imports take most of a start. While a server runs, its standby process has done them and holds no
memory of a card. It becomes the engine at a restart, a wake-up or a turn, of any model. Its process
group, guard and output are an engine's from the beginning (`core.process.guard`: the kernel kills
it when turbofit dies). The message that makes it an engine brings the command and environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from threading import Lock, current_thread, main_thread
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.process.log import LazyLogger
from turbofit.core.process.processes import child
from turbofit.core.process.stat import processor_seconds
from turbofit.core.struct import known
from turbofit.core.units import GIB
from turbofit.serving.engine.gemm_tuning import VARIABLES
from turbofit.serving.engine.launches import KEY
from turbofit.serving.engine.lmdeploy import ENTRY
from turbofit.serving.images.preparation import CACHE, THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from turbofit.serving.options import ServeConfig

_LOG: Final = LazyLogger(__name__)

#: Modules that LMDeploy's server loads before it reads a model's folder.
_LMDEPLOY: Final = (
    "lmdeploy.cli.entrypoint", "lmdeploy.serve.openai.api_server", "lmdeploy.vl.engine",
    "lmdeploy.vl.model.builder", "lmdeploy.turbomind.turbomind", "lmdeploy.turbomind.converter",
    "lmdeploy.serve.parsers.tool_parser", "lmdeploy.serve.parsers.reasoning_parser",
    "lmdeploy.hf_configs", "prometheus_client", "uvicorn.protocols.websockets.wsproto_impl",
)  # fmt: skip
#: Imports of each module that runs an engine.
_IMPORTS: Final = {
    "lmdeploy": _LMDEPLOY,
    "turbofit.rehearsal.turbomind.server": (
        "turbofit.rehearsal.turbomind.server:preload", *_LMDEPLOY,
    ),
}  # fmt: skip
#: Variables that are read only once an engine runs. An import may read any other.
_LATE: Final = (
    KEY, THREADS, CACHE, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TURBOFIT_PRETEND_SCENARIO",
    "TURBOFIT_PRETEND_MACHINE", *VARIABLES,
)  # fmt: skip
#: Libraries of this variable read a pretend machine while torch is imported.
_PRELOADED: Final = "LD_PRELOAD"
#: Bytes of host memory that must be available before a standby starts, and those that it takes.
LEAST_AVAILABLE: Final = 8 * GIB
STANDBY_BYTES: Final = 1 * GIB
_LOOK_SECONDS: Final = 1.0
#: Seconds in which a standby must answer, or be seen to import, when it is told what it becomes.
_ANSWER_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.02
#: Seconds until another standby begins after one that ended by itself.
_PAUSE_SECONDS: Final = 60.0
#: Seconds to wait after SIGKILL: a process in a system call may outlive it.
_END_SECONDS: Final = 10.0


class Kind(NamedTuple):
    """The common properties of all engines that one standby can become."""

    module: str
    environment: tuple[tuple[str, str], ...]


def kind_of(argv: Sequence[str], env: Mapping[str, str]) -> Kind | None:
    """Return the kind of an engine's command; None if no standby can become such an engine."""
    words = tuple(argv[:3])
    if words[:2] != (sys.executable, ENTRY) or words[2] not in _IMPORTS or _PRELOADED in env:
        return None
    early = {name: value for name, value in env.items() if name not in _LATE}
    return Kind(words[2], tuple(sorted(early.items())))


class Standby:
    """A process that has imported an engine's modules and can become that engine at once.

    Create it in the main thread: the kernel kills the process when the creating thread ends.
    """

    def __init__(self, kind: Kind) -> None:
        argv = (sys.executable, ENTRY, "--standby", *_IMPORTS[kind.module])
        self.kind = kind
        self._talk, theirs = socket.socketpair()
        with theirs:
            self._process = child(argv, dict(kind.environment), stdin=theirs.fileno())
        _LOG.info("process %d stands by", self._process.pid)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fits(self, kind: Kind | None) -> bool:
        """Return whether the standby can become an engine of this kind."""
        return self.kind == kind and self.alive

    @property
    def pid(self) -> int:
        return self._process.pid

    def become(self, words: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Tell the standby which engine it becomes; return its process.

        Raises:
            OSError: the standby has ended, or gives no sign of life in time.
        """
        environment = {name: env.get(name) for name in _LATE}
        told = json.dumps({"environment": environment, "words": list(words)})
        before, until = processor_seconds(self.pid), time.monotonic() + _ANSWER_SECONDS
        self._talk.settimeout(_ANSWER_SECONDS)
        with self._talk:
            self._talk.sendall(told.encode() + b"\n")
            self._talk.settimeout(_POLL_SECONDS)
            while processor_seconds(self.pid) <= before:  # else it imports, or answers just now
                if time.monotonic() >= until:
                    raise TimeoutError
                with suppress(TimeoutError):
                    if not self._talk.recv(1):
                        raise ConnectionError
                    break
        return self._process

    def end(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        for pipe in (self._talk, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class StandbyStarter:
    """Keeps one standby process for a server, of the same kind as the last engine that was started.

    ``available`` returns the bytes of host memory that are available. Any thread may call `spawn`;
    only the main thread may call the other methods.
    """

    def __init__(self, available: Callable[[], int], say: Callable[[str], None]) -> None:
        self._available, self._say = available, say
        self._lock = Lock()
        self._kind: Kind | None = None
        self._standby: Standby | None = None
        self._again = 0.0

    def expect(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Expect an engine with this command: `look` starts a standby for it."""
        with self._lock:
            self._kind = kind_of(argv, env)

    def spawn(self, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start an engine: the standby becomes it, or a new process if the standby does not fit."""
        kind = kind_of(argv, env)
        with self._lock:
            # A standby that has ended or is of another kind is dropped; `look` starts the next.
            self._kind, standby, self._standby = kind, self._standby, None
        if standby is not None:
            if standby.fits(kind):
                with suppress(OSError):
                    return standby.become(argv[2:], env)
                self._say("warning: the standby does not answer: the engine is a new process")
            standby.end()
        return child(argv, env)

    def look(self, needed: int = 0) -> None:
        """Start a standby if none runs; end it if it is of no use, or if host memory runs short.

        ``needed``: bytes of host memory that must stay for engines which do not run now. Outside
        the main thread it does nothing: the kernel would end the standby together with its creating
        thread.
        """
        now = time.monotonic()
        if current_thread() is not main_thread() or now < self._again:
            return
        self._again = now + _LOOK_SECONDS
        available, least = self._available(), max(LEAST_AVAILABLE, needed + STANDBY_BYTES)
        with self._lock:
            kind, standby = self._kind, self._standby
            # A running standby stays until much less is available, or it would come and go.
            if standby is not None and standby.fits(kind) and available >= least // 2:
                return
            self._standby = None
        if standby is not None:
            died = not standby.alive
            standby.end()
            if died:
                self._again = now + _PAUSE_SECONDS
                pause = f"another begins in {_PAUSE_SECONDS:.0f} s"
                self._say(f"warning: a standby ended by itself: {pause}")
                return
        if kind is not None and available >= least:
            with suppress(OSError):
                begun = Standby(kind)
                with self._lock:
                    self._standby = begun

    def end(self) -> None:
        with self._lock:
            standby, self._standby, self._kind = self._standby, None, None
        if standby is not None:
            standby.end()


@contextmanager
def standby_of(config: ServeConfig, say: Callable[[str], None]) -> Iterator[StandbyStarter | None]:
    """Keep a standby for a server until the server ends; yields None if no standby is wanted."""
    if config.no_standby:
        yield None
        return
    from turbofit.machine.host import read_host

    starter = StandbyStarter(lambda: known(read_host().ram_available, 0), say)
    try:
        yield starter
    finally:
        starter.end()
