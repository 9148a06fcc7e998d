"""How each engine of a plan is started: words, environment, port.

A launch can be made several times (an engine that died is started again on its port), so it is a
recipe: `Launch.start_command` gives what one start needs.
"""

from __future__ import annotations

import os
import random
import socket
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from turbofit.core.errors import LaunchError
from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.launch.engine.fitted_cache import with_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from turbofit.core.plan import Command

__all__ = [
    "HOST",
    "KEY",
    "Launch",
    "StartCommand",
    "free_ports",
    "port_of",
]

#: Engines listen here only: their management routes are open to whoever reaches them.
HOST: Final = "127.0.0.1"

#: Private ports are looked for from here on.
_FIRST_PORT: Final = 20000

#: The variable in which `entry.py` finds the engine's API key.
KEY: Final = "TURBOFIT_ENGINE_KEY"


class StartCommand(NamedTuple):
    """One start: the command, its environment, and where a pretend machine's timeline is.

    That is a file, or the machine's folder where several processes share it.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    timeline: Path | None = None


@dataclass
class Launch:
    """An engine on real GPUs.

    ``command`` is what the plan says, with whatever the user added; ``runner`` are the words that
    start LMDeploy, in the place of its first. ``hidden``: the engine is given its ``key`` out of
    sight, else its command has it. ``ratio`` gives the cache ratio of each start; None is the
    command's for all of them.
    """

    command: Command
    runner: Sequence[str]
    key: str | None = None
    _: KW_ONLY
    hidden: bool = False
    ratio: Callable[[], float] | None = None

    pretend: ClassVar[bool] = False

    @property
    def group(self) -> int:
        """Which of the plan's groups it is."""
        return self.command.group

    @property
    def port(self) -> int:
        """Where it will listen."""
        return port_of(self.command)

    def start_command(self, number: int) -> StartCommand:  # noqa: ARG002 - a pretend launch needs it
        """What the start with this number (from 0) needs."""
        return StartCommand(self.argv(), self.environment({**os.environ, **self.command.env}))

    def argv(self) -> tuple[str, ...]:
        """The words of this start."""
        words = tuple(self.command.argv[1:])
        return (*self.runner, *(words if self.ratio is None else with_ratio(words, self.ratio())))

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Variables for an engine: unbuffered output, its own imports, and its hidden key."""
        env = {**base, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        return {**env, KEY: self.key} if self.hidden and self.key else env


def port_of(command: Command) -> int:
    """The port that a command's engine will listen on."""
    argv = command.argv
    for option in ("--server-port", "--port"):  # LMDeploy's, the fallback engine's
        if option in argv:
            return int(argv[argv.index(option) + 1])
    return DEFAULT_PORT


def free_ports(count: int, besides: int | None = None) -> list[int]:
    """Ports on loopback that nobody has at this moment.

    They are taken from below the range of outgoing connections: the kernel may give a port of that
    range to an outgoing connection before the engine listens, even to a client that asks whether
    the engine listens yet.

    Args:
        count: how many.
        besides: one that somebody is about to take.

    Raises:
        LaunchError: there are none, or no socket can be made.
    """
    from turbofit.gateway.server import tcp_socket

    held: list[socket.socket] = []
    candidates = list(range(_FIRST_PORT, max(_FIRST_PORT + 1000, _outgoing())))
    random.SystemRandom().shuffle(candidates)
    try:
        for port in candidates:
            if len(held) == count:
                break
            if port == besides:
                continue
            one = tcp_socket(socket.AF_INET)
            try:
                one.bind((HOST, port))
            except OSError:
                one.close()
            else:
                held.append(one)
        if len(held) < count:
            raise LaunchError("no port on loopback can be had", hint="see ss -tln")
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def _outgoing() -> int:
    """The first port that the kernel gives to outgoing connections."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            return int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768
