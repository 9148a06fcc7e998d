"""The server under test, with two engines: its processes, and each engine's address."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.support.checkpoints import make_internvl2
from tests.support.processes import REPO, Child, alive, free_port, gone, pids

__all__ = ["ENGINES", "EngineAddress", "Soaked", "running"]

ENGINES: Final = 2
_SESSION: Final = REPO / "tests" / "support" / "session_driver.py"
_KEY: Final = "TURBOFIT_ENGINE_KEY"
_LEASES: Final = "TURBOFIT_LEASES"
_SPEC: Final = f"{ENGINES}xrtx3090"


class EngineAddress(NamedTuple):
    """Where an engine listens, and the key that it was given, if any."""

    pid: int
    port: int
    key: str


class Soaked:
    """A turbofit that serves two replicas.

    Args:
        engine: ``stand-in`` (prints and dies like LMDeploy, starts in a second) or ``pretend``
            (LMDeploy's own server and TurboMind on pretend GPUs).
        folder: its state.
    """

    def __init__(self, engine: str, folder: Path) -> None:
        self.port, self._state = free_port(), folder
        self._leases = folder / "leases"
        self._standin = engine == "stand-in"
        plan = {"tp": 1, "replicas": ENGINES}
        if self._standin:
            model = str(make_internvl2(folder / "model" / "InternVL2-1B"))
            options = json.dumps(
                {"fixed": {**plan, "model": model}, "timing": {"backoff": 1.0}, "gateway": True}
            )
            words = [str(_SESSION), _SPEC, str(self.port), options]
        else:
            given = [word for name, value in plan.items() for word in (f"--{name}", str(value))]
            words = ["-m", "turbofit", "serve", "internvl2-1b", "--on", _SPEC, *given, "--pretend",
                     "--port", str(self.port)]  # fmt: skip
        self.child = Child(
            [sys.executable, *words], standin=self._standin, XDG_STATE_HOME=str(folder),
            STANDIN_SCRIPT="serve", **{_LEASES: str(self._leases)},
        )  # fmt: skip

    def wait(self) -> None:
        """Until it has opened."""
        self.child.wait_for("phase: ready", ENGINES)
        if self._standin:
            self.child.wait_for("OPEN ")
        else:
            assert self.child.process.stdout is not None
            self.child.process.stdout.readline()  # its address

    @property
    def pid(self) -> int:
        """The process that supervises, and whose threads are the gateway."""
        return self.child.process.pid

    @property
    def folder(self) -> Path:
        """The run's."""
        return max(
            (self._state / "turbofit" / "runs").iterdir(), key=lambda one: one.stat().st_mtime
        )

    def engines(self) -> list[EngineAddress]:
        """Those that run now."""
        found = []
        for pid in running(self.child, self._leases):
            words = _words(pid, "cmdline")
            if "--server-port" in words:  # else it has just been forked
                port = int(words[words.index("--server-port") + 1])
                found.append(EngineAddress(pid, port, _variable(pid, _KEY)))
        return found

    def end(self) -> list[str]:
        """SIGTERM; what was left behind, and an exit that is not 0."""
        engines = running(self.child, self._leases)
        self.child.process.send_signal(signal.SIGTERM)
        code = self.child.finish(120)
        wrong = [f"exit {code}"] if code else []
        wrong += [f"process {pid} is left" for pid in engines if not gone(pid, 10)]
        return wrong + [f"{path} is left" for path in self._leases.glob("*.json")]

    def kill(self) -> None:
        """Whatever happened before: nothing stays."""
        for pid in running(self.child, self._leases):
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.child.kill()


def running(child: Any, leases: Path) -> list[int]:
    """The engines' processes that have not ended.

    Others get their numbers within hours: whose leases it keeps says whose process it is.
    """
    started = [pid for pid in pids(child) if alive(pid)]
    return [pid for pid in started if _variable(pid, _LEASES) == str(leases)]


def _variable(pid: int, name: str) -> str:
    """A variable of a process's environment; nothing where it has ended, or has none."""
    named = f"{name}="
    found = (word for word in _words(pid, "environ") if word.startswith(named))
    return next(found, named).removeprefix(named)


def _words(pid: int, file: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace").split("\0")
    except OSError:
        return []
