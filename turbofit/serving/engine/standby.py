"""Keeps a standby: a process that has imported an engine's modules and can become an engine.

Imports take most of a start. While a server runs, its standby has done the imports and holds no
memory of a card. At the next start of an engine, the standby becomes the engine. A standby has the
process group, guard and output of an engine (`process.guard`: the kernel kills the standby when
turbofit dies). A message tells the standby the engine's command and environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Lock, current_thread, main_thread
from typing import Final, NamedTuple

from turbofit.core.process.log import LazyLogger
from turbofit.core.struct import known
from turbofit.core.units import GIB
from turbofit.serving.engine.gemm_tuning import VARIABLES
from turbofit.serving.engine.launches import KEY
from turbofit.serving.engine.lmdeploy import ENTRY
from turbofit.serving.images.preparation import CACHE, THREADS
from turbofit.serving.options import ServeConfig
from turbofit.serving.process.child import child, processor_seconds

_LOG: Final = LazyLogger(__name__)

#: Modules that LMDeploy's server loads before it reads a model's folder.
_LMDEPLOY: Final = (
    "lmdeploy.cli.entrypoint", "lmdeploy.serve.openai.api_server", "lmdeploy.vl.engine",
    "lmdeploy.vl.model.builder", "lmdeploy.turbomind.turbomind", "lmdeploy.turbomind.converter",
    "lmdeploy.serve.parsers.tool_parser", "lmdeploy.serve.parsers.reasoning_parser",
    "lmdeploy.hf_configs", "prometheus_client", "uvicorn.protocols.websockets.wsproto_impl",
)  # fmt: skip
#: What a standby imports, by the module that will run the engine.
_IMPORTS: Final = {
    "lmdeploy": _LMDEPLOY,
    "turbofit.rehearsal.turbomind.server": (
        "turbofit.rehearsal.turbomind.server:preload", *_LMDEPLOY,
    ),
}  # fmt: skip
#: Variables that only a running engine reads. Imports may read any other variable.
_LATE: Final = (
    KEY, THREADS, CACHE, "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TURBOFIT_PRETEND_SCENARIO",
    "TURBOFIT_PRETEND_MACHINE", *VARIABLES,
)  # fmt: skip
#: With this variable there is no standby: libraries in it read the engine's pretend machine during
#: the import of torch.
_PRELOADED: Final = "LD_PRELOAD"
#: Bytes of host memory that must be available before a standby is started.
LEAST_AVAILABLE: Final = 8 * GIB
#: Bytes of host memory that a standby takes.
STANDBY_BYTES: Final = 1 * GIB
_LOOK_SECONDS: Final = 1.0
#: Seconds in which a standby must answer the message, or use processor time for its imports.
_ANSWER_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.02
#: Seconds between the unexpected end of a standby and the start of another standby.
_PAUSE_SECONDS: Final = 60.0
#: Seconds to wait after SIGKILL, which a process in a system call may outlive.
_END_SECONDS: Final = 10.0


class Kind(NamedTuple):
    """The common properties of all engines that one standby can become."""

    module: str
    environment: tuple[tuple[str, str], ...]


def kind_of(argv: Sequence[str], env: Mapping[str, str]) -> Kind | None:
    """Return the kind of an engine's command; None if no standby can become this engine."""
    words = tuple(argv[:3])
    if words[:2] != (sys.executable, ENTRY) or words[2] not in _IMPORTS or _PRELOADED in env:
        return None
    early = {name: value for name, value in env.items() if name not in _LATE}
    return Kind(words[2], tuple(sorted(early.items())))


class Standby:
    """A process that has imported an engine's modules and can become that engine at once.

    Create this object in the main thread: the kernel kills the process when its creating thread
    ends.
    """

    def __init__(self, kind: Kind) -> None:
        argv = (sys.executable, ENTRY, "--standby", *_IMPORTS[kind.module])
        self.kind = kind
        #: Our end of the socket that is the standby's input.
        self._talk, its_end = socket.socketpair()
        with its_end:
            self._process = child(argv, dict(kind.environment), stdin=its_end.fileno())
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
        """Send the standby an engine's command and environment; return the process.

        Raises:
            OSError: the standby has ended, or gives no sign of life in time.
        """
        environment = {name: env.get(name) for name in _LATE}
        message = json.dumps({"environment": environment, "words": list(words)})
        before, until = processor_seconds(self.pid), time.monotonic() + _ANSWER_SECONDS
        self._talk.settimeout(_ANSWER_SECONDS)
        with self._talk:
            self._talk.sendall(message.encode() + b"\n")
            self._talk.settimeout(_POLL_SECONDS)
            while processor_seconds(self.pid) <= before:  # processor time is a sign of life
                if time.monotonic() >= until:
                    raise TimeoutError
                with suppress(TimeoutError):
                    if not self._talk.recv(1):
                        raise ConnectionError
                    break
        return self._process

    def end(self) -> None:
        """Kill the standby and the rest of its process group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        for pipe in (self._talk, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class StandbyStarter:
    """Keeps one standby for a server, of the same kind as the last started engine.

    ``available`` returns the bytes of host memory that are available. Any thread may call `spawn`;
    only the main thread may call the other methods.
    """

    def __init__(self, available: Callable[[], int], say: Callable[[str], None]) -> None:
        self._available, self._say = available, say
        self._lock = Lock()
        #: The kind of the last started or expected engine; None if no standby can become it.
        self._kind: Kind | None = None
        self._standby: Standby | None = None
        #: The earliest time of the next look.
        self._again = 0.0

    def expect(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Expect an engine with this command; `look` starts a standby of its kind."""
        with self._lock:
            self._kind = kind_of(argv, env)

    def spawn(self, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start an engine: the standby if it fits, else a new process."""
        kind = kind_of(argv, env)
        with self._lock:
            # A standby that does not fit is dropped; `look` starts the next standby.
            self._kind, standby, self._standby = kind, self._standby, None
        if standby is not None:
            if standby.fits(kind):
                with suppress(OSError):
                    return standby.become(argv[2:], env)
                self._say("warning: the standby does not answer: the engine is a new process")
            standby.end()
        return child(argv, env)

    def look(self, needed: int = 0) -> None:
        """Start a missing standby; end a standby that does not fit, or that takes scarce memory.

        ``needed``: bytes of host memory that must stay free for sleeping engines. Outside the main
        thread nothing happens, since the kernel ends a standby together with its creating thread.
        """
        now = time.monotonic()
        if current_thread() is not main_thread() or now < self._again:
            return
        self._again = now + _LOOK_SECONDS
        available, least = self._available(), max(LEAST_AVAILABLE, needed + STANDBY_BYTES)
        with self._lock:
            kind, standby = self._kind, self._standby
            # A running standby stays with half of `least`, so that standbys do not come and go.
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
    """Keep a standby for a server until the server ends; yield None with ``no_standby``."""
    if config.no_standby:
        yield None
        return
    from turbofit.machine.host import read_host

    starter = StandbyStarter(lambda: known(read_host().ram_available, 0), say)
    try:
        yield starter
    finally:
        starter.end()
