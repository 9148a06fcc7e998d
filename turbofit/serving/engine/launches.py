"""How each engine of a plan is started: LMDeploy's words, environment, port, cache ratio."""

from __future__ import annotations

import os
import random
import socket
import sys
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, dataclass
from math import ceil
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.errors import LaunchError, PackageError
from turbofit.core.installation import install_command, installed, without_gpu
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.core.version import REFERENCE
from turbofit.memory.engines import LMDEPLOY
from turbofit.memory.versions import OLDEST_SERVED, release

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.plan import Command, Plan
    from turbofit.serving.engine.gemm_tuning import GemmTuning
    from turbofit.serving.engine.process import Begin

_LOG: Final = LazyLogger(__name__)


class Lmdeploy(NamedTuple):
    """The LMDeploy that would be launched: its version and the words that start it."""

    version: str
    argv: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """Warns if the plan's account is for another version of LMDeploy; None otherwise."""
        actual, planned = release(self.version), release(REFERENCE)
        if actual == planned:
            return None
        how = "newer" if actual > planned else "older"
        return f"LMDeploy {self.version} is {how} than {REFERENCE}, which the plan's account is for"


def find_lmdeploy() -> Lmdeploy:
    """LMDeploy of this interpreter, not imported; a `PackageError` if it is missing or too old."""
    version = installed("lmdeploy")
    if version is None:
        raise PackageError(
            "LMDeploy is not installed beside turbofit",
            hint=f"install it with {install_command('lmdeploy')}, or turbofit where LMDeploy is"
            f"{without_gpu()}",
        )
    _LOG.info("LMDeploy %s", version)
    if release(version) < OLDEST_SERVED:
        oldest = ".".join(map(str, OLDEST_SERVED))
        raise PackageError(
            f"LMDeploy {version} is older than {oldest}, which serve needs",
            hint=f"install a newer one with {install_command('lmdeploy', upgrade=True)}",
        )
    return Lmdeploy(version, module_runner("lmdeploy"))


def lmdeploy_if_needed(engine: str | None) -> Lmdeploy:
    """LMDeploy, or one without words to start it if another engine may be chosen.

    Raises:
        PackageError: LMDeploy is missing, and ``engine`` is one of its engines.
    """
    try:
        return find_lmdeploy()
    except PackageError:
        if engine in LMDEPLOY:
            raise
        return Lmdeploy(REFERENCE, ())


#: The program that becomes LMDeploy's command line.
ENTRY: Final = str(Path(__file__).with_name("entry.py"))


def module_runner(module: str) -> tuple[str, ...]:
    return sys.executable, ENTRY, module


#: Engines listen only here: their management routes are open to every client.
HOST: Final = "127.0.0.1"

#: Private ports; Linux uses those from 32768 on for outgoing connections.
_PORTS: Final = range(20000, 32768)

#: The variable in which `entry.py` finds the engine's API key.
KEY: Final = "TURBOFIT_ENGINE_KEY"


class StartCommand(NamedTuple):
    """One start; ``timeline`` is a pretend machine's file, or its folder if processes share it."""

    argv: tuple[str, ...]
    env: dict[str, str]
    timeline: Path | None = None


@dataclass
class Launch:
    """An engine on real GPUs, which can be started again and again.

    ``runner`` are the words that start LMDeploy, and replace the command's first word. A ``key``
    that is not in the command is given to the engine in its environment. ``ratio`` returns the
    cache ratio of each start; with None the command's is used. ``images`` are the variables that
    say how the engine's process prepares images. ``begin`` starts the process; None means
    `core.process.child`. ``tuning`` keeps the engine's kernels; None keeps nothing.
    """

    command: Command
    runner: Sequence[str]
    key: str | None = None
    _: KW_ONLY
    ratio: Callable[[], float] | None = None
    begin: Begin | None = None
    images: Mapping[str, str] | None = None
    tuning: GemmTuning | None = None

    @property
    def group(self) -> int:
        return self.command.group

    @property
    def port(self) -> int:
        return port_of(self.command)

    def start_command(self, number: int) -> StartCommand:  # noqa: ARG002 - a pretend launch needs it
        """The command, environment and timeline of the start with this number, from 0."""
        return StartCommand(self.argv(), self.environment({**os.environ, **self.command.env}))

    def argv(self) -> tuple[str, ...]:
        words = tuple(self.command.argv[1:])
        return (*self.runner, *(words if self.ratio is None else with_ratio(words, self.ratio())))

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The engine's environment: unbuffered output, only its own imports, and its hidden key.

        RAY_ADDRESS is "local": the ranks of LMDeploy's PyTorch engine would otherwise join a Ray
        cluster of this host, and take GPUs that the plan does not name.
        """
        tuned = {} if self.tuning is None else self.tuning.environment()
        env = {"RAY_ADDRESS": "local", **base, **(self.images or {}), **tuned}
        env |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        if self.key is None or self.key in self.command.argv:
            return env
        return {**env, KEY: self.key}


def port_of(command: Command) -> int:
    argv = command.argv
    for option in ("--server-port", "--port"):  # LMDeploy's, the fallback engine's
        if option in argv:
            return int(argv[argv.index(option) + 1])
    return DEFAULT_PORT


def free_ports(count: int, besides: int | None = None) -> list[int]:
    """``count`` free ports on loopback, without ``besides``, which another listener will take.

    They are below the range of outgoing connections: the kernel may give a port of that range to
    any client before the engine listens, even to one that asks whether it does.

    Raises:
        LaunchError: too few ports are free, or no socket can be made.
    """
    from turbofit.gateway.server import tcp_socket

    ports: list[int] = []
    with ExitStack() as sockets:
        endpoint = sockets.enter_context(tcp_socket(socket.AF_INET))
        for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
            if len(ports) == count:
                return ports
            if port == besides:
                continue
            with suppress(OSError):  # the port is in use: the same socket tries the next one
                endpoint.bind((HOST, port))
                ports.append(port)
                endpoint = sockets.enter_context(tcp_socket(socket.AF_INET))
    raise LaunchError("no port on loopback can be had", hint="see ss -tln")


#: LMDeploy's cache is a share of the memory that is free at that moment. This is not what the plan
#: counted if others have grown, or sleep and will take more.
RATIO: Final = "--cache-max-entry-count"
#: Steps in a ratio: one is 24 KiB of a card with 24 GiB.
_STEPS: Final = 10**6


def fitted_ratio(plan: Plan, group: int, free: Mapping[str, int]) -> float:
    """The ratio that gives the cache of a group's engine its planned bytes, else the plan's ratio.

    LMDeploy applies the ratio, which is rounded up so that no page is lost, to the free memory of
    the group's fullest card. ``free``: free bytes by GPU UUID before the engine starts.
    """
    group_plan, members = plan.of_group(group), plan.parallel.groups[group]
    ratio, region = group_plan.settings.cache_max_entry_count, group_plan.kv.region_bytes
    # Cards of other groups hold what their engines have taken by now.
    gpus = [gpu for gpu in group_plan.gpus if gpu.index in members]
    if not ratio or not region or not any(gpu.uuid in free for gpu in gpus):
        return ratio
    planned = [gpu.free_for_cache for gpu in gpus]
    more = [free.get(gpu.uuid, gpu.free) - gpu.free for gpu in gpus]
    shared = region / ratio + min(map(add, planned, more)) - min(planned)
    steps = ceil(region / shared * _STEPS) if shared > region else _STEPS
    return steps / _STEPS if steps < _STEPS else ratio


def with_ratio(argv: tuple[str, ...], ratio: float) -> tuple[str, ...]:
    if RATIO not in argv:
        return argv
    place = argv.index(RATIO) + 1
    return (*argv[:place], f"{ratio:.6f}", *argv[place + 1 :])


def ratio_now(plan: Plan, group: int) -> float:
    """The ratio of a start on real GPUs; it gives the planned bytes if more is free than planned.

    If less is free it is the plan's ratio, so that the cache shrinks with the free memory. Memory
    that others give back during loading, before LMDeploy's own look, makes the cache too large.
    """
    planned = plan.of_group(group).settings.cache_max_entry_count
    return min(planned, shared_ratio(plan, group))


def shared_ratio(plan: Plan, group: int) -> float:
    """The ratio of a start whose budget leaves memory to others; it always gives the planned bytes.

    It is too low if others grow within their parts of the cards during loading. Two engines that
    start at the same time do not know of each other.
    """
    from turbofit.serving.gpu_monitor import used_now

    used = used_now(plan)
    gpus = [gpu for gpu in plan.gpus if gpu.index in used]  # other GPUs cannot be read
    free = {gpu.uuid: gpu.usable - used[gpu.index] for gpu in gpus}
    return fitted_ratio(plan, group, free)
