"""The server under test, with two engines: its processes, and each engine's address."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.faults.ground import Ground
from tests.support.checkpoints import make_internvl2
from tests.support.processes import alive, gone, pids

ENGINES: Final = 2
_KEY: Final = "TURBOFIT_ENGINE_KEY"
_LEASES: Final = "TURBOFIT_LEASES"


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
        ground: where it is started, and killed whatever happens.
    """

    def __init__(self, engine: str, ground: Ground) -> None:
        self._leases, self._engine = ground.state / "leases", engine
        spec, plan = f"{ENGINES}xrtx3090", {"tp": 1, "replicas": ENGINES}
        if engine == "stand-in":
            model = str(make_internvl2(ground.state / "model" / "InternVL2-1B"))
            self.server = ground.standin(
                "serve", on=spec, fixed={**plan, "model": model}, timing={"backoff": 1.0},
                gateway=True,
            )  # fmt: skip
        else:
            given = [word for name, value in plan.items() for word in (f"--{name}", str(value))]
            self.server = ground.pretend("internvl2-1b", "--on", spec, *given)
        self.child, self.port = self.server.child, self.server.port

    def wait(self) -> None:
        """Until it has opened."""
        self.child.wait_for("phase: ready", ENGINES)
        if self._engine == "stand-in":
            self.child.wait_for("OPEN ")
        else:
            self.server.opened()

    @property
    def pid(self) -> int:
        """The process that supervises, and whose threads are the gateway."""
        return self.child.process.pid

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.server.run

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
        code = self.server.end()
        wrong = [f"exit {code}"] if code else []
        wrong += [f"process {pid} is left" for pid in engines if not gone(pid, 10)]
        return wrong + [f"{path} is left" for path in self._leases.glob("*.json")]


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
