"""How each engine of a plan is started: words, environment, port; on real GPUs or on pretend ones.

A launch can be made several times (an engine that died is started again on its port), so it is a
recipe: `Launch.start_command` gives what one start needs.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import LaunchError
from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.launch.engine.fitted_cache import with_ratio
from turbofit.planning.commands import module_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from turbofit.core.plan import Command, Plan
    from turbofit.launch.engine.pretended import PretendFaults

__all__ = ["HOST", "KEY", "Launch", "PretendLaunch", "StartCommand", "free_ports", "port_of"]

#: Engines listen here only: their management routes are open to whoever reaches them.
HOST: Final = "127.0.0.1"

#: Private ports are looked for from here on.
_FIRST_PORT: Final = 20000

#: The variable in which `entry.py` finds the engine's API key.
KEY: Final = "TURBOFIT_ENGINE_KEY"


class StartCommand:
    """One start: the command, its environment, and where a pretend machine's timeline is.

    That is a file, or the machine's folder where several processes share it.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], timeline: Path | None = None
    ) -> None:
        self.argv, self.env, self.timeline = tuple(argv), dict(env), timeline


class Launch:
    """An engine on real GPUs.

    Args:
        command: what the plan says, with whatever the user added; its first word is replaced.
        runner: the words that start LMDeploy.
        key: the engine's API key, where it has one.
        hidden: whether the engine must be given it, out of sight; else its command has it.
        ratio: gives the cache ratio of each start; None is the command's for all of them.
    """

    pretend = False

    def __init__(
        self,
        command: Command,
        runner: Sequence[str],
        key: str | None = None,
        *,
        hidden: bool = False,
        ratio: Callable[[], float] | None = None,
    ) -> None:
        self.command, self.runner, self.key = command, tuple(runner), key
        self._ratio = ratio
        self._hidden = key if hidden else None
        self.group, self.port = command.group, port_of(command)

    def start_command(self, number: int) -> StartCommand:  # noqa: ARG002 - a pretend launch needs it
        """What the start with this number (from 0) needs."""
        env = {**os.environ, **self.command.env, **_child_variables(self._hidden)}
        return StartCommand((*self.runner, *self._arguments()), env)

    def _arguments(self) -> tuple[str, ...]:
        """What follows the command's first word, at this start."""
        argv = tuple(self.command.argv[1:])
        return argv if self._ratio is None else with_ratio(argv, self._ratio())


class PretendLaunch(Launch):
    """An engine on pretend GPUs: LMDeploy's own server and engine, memory and nothing else real.

    Args:
        plan: what the machine looks like, and what a pretend card is charged with beforehand.
        command: as for `Launch`.
        folder: where the scenario and the timeline of each start go.
        key: as for `Launch`.
        hidden: as for `Launch`.
        faults: what goes wrong; the allocation that fails is one of the first start.
        ratio: as for `Launch`.
        shared: the file through which engines share the pretend machine; None: each start has a
            machine of its own.
    """

    pretend = True

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        plan: Plan,
        command: Command,
        folder: Path,
        key: str | None = None,
        *,
        hidden: bool = False,
        faults: PretendFaults | None = None,
        ratio: Callable[[], float] | None = None,
        shared: Path | None = None,
    ) -> None:
        from turbofit.launch.engine.environment import module_runner

        self._torch = plan.engine.on_torch
        module = module_of(plan.engine) if self._torch else "turbofit.rehearse.turbomind.server"
        super().__init__(command, module_runner(module), key, hidden=hidden, ratio=ratio)
        self._plan, self._folder, self._faults, self._shared = plan, folder, faults, shared

    def start_command(self, number: int) -> StartCommand:
        """What the start with this number needs; each has a machine of its own.

        Raises:
            PackageError: LMDeploy or a C compiler is missing.
        """
        from turbofit.launch.engine.pretended import on_shared_cards, pretend_machine
        from turbofit.rehearse.turbomind.server import server_launch

        folder = self._folder / f"{self.group}-{number}"
        shutil.rmtree(self._folder / f"{self.group}-{number - 1}", ignore_errors=True)
        arguments = self._arguments()
        faults = self._faults
        if faults is not None and number:
            faults = faults._replace(fail_at=None)
        machine = pretend_machine(self._plan, self.group, faults)
        if self._torch:
            from turbofit.launch.engine.pretended import torch_environment

            base = {**os.environ, **self.command.env}
            env = torch_environment(self._plan, machine, folder, base)
            return StartCommand(
                (*self.runner, *arguments), {**env, **_child_variables(self._hidden)}, folder
            )
        if self._shared is not None:
            machine = on_shared_cards(machine, self._plan, self.group)
        shared = "" if self._shared is None else str(self._shared)
        made = server_launch(machine, arguments, folder, shared=shared)
        return StartCommand(
            (*self.runner, *arguments),
            {**made.env, **_child_variables(self._hidden)},
            made.timeline,
        )


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


def _child_variables(key: str | None) -> dict[str, str]:
    """Variables for an engine: unbuffered output, its own imports, and its hidden key."""
    env = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    return {**env, KEY: key} if key else env
