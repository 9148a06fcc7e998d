"""How each engine of a plan is started: which LMDeploy, words, environment, port, cache ratio."""

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
from turbofit.observe.calibration import free_for_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.plan import Command, Plan
    from turbofit.launch.engine.gemm_tuning import GemmTuning
    from turbofit.launch.engine.process import Begin

_LOG: Final = LazyLogger(__name__)


class Lmdeploy(NamedTuple):
    """The LMDeploy that would be launched: its version and the words that start it."""

    version: str
    argv: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """The warning about its version, where the account is for another one."""
        actual, planned = release(self.version), release(REFERENCE)
        if actual == planned:
            return None
        how = "newer" if actual > planned else "older"
        return f"LMDeploy {self.version} is {how} than {REFERENCE}, which the plan's account is for"


def find_lmdeploy() -> Lmdeploy:
    """LMDeploy of this interpreter, without its slow import; a `PackageError`: none, or too old."""
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
    """LMDeploy, or one without words that start it where the engine may turn out to be another.

    Raises:
        PackageError: it is missing, and it was asked for.
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


#: Engines listen here only: their management routes are open to whoever reaches them.
HOST: Final = "127.0.0.1"

#: Private ports; Linux takes those of outgoing connections from 32768 on.
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

    ``runner`` are the words that start LMDeploy, in the place of the command's first. A ``key``
    that is not in the command is given to the engine out of sight. ``ratio`` gives the cache ratio
    of each start; None is the command's for all of them. ``images`` are the variables that say how
    the engine's process prepares images. ``begin`` starts the process; None is
    `process.begin_process`. ``tuning`` is what is kept of an engine's kernels; None is nothing.
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
        """What the start with this number, from 0, needs."""
        return StartCommand(self.argv(), self.environment({**os.environ, **self.command.env}))

    def argv(self) -> tuple[str, ...]:
        words = tuple(self.command.argv[1:])
        return (*self.runner, *(words if self.ratio is None else with_ratio(words, self.ratio())))

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Variables for an engine: unbuffered output, its own imports, and its hidden key.

        The ranks of LMDeploy's PyTorch engine would join a Ray cluster that runs on this host, and
        take GPUs that the plan does not name.
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
    """``count`` ports on loopback that nobody has; ``besides`` is one that somebody will take.

    They are from below the range of outgoing connections: the kernel may give a port of that range
    to any client before the engine listens, even to one that asks whether it does.

    Raises:
        LaunchError: there are none, or no socket can be made.
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
            with suppress(OSError):  # somebody has it: the same socket tries the next one
                endpoint.bind((HOST, port))
                ports.append(port)
                endpoint = sockets.enter_context(tcp_socket(socket.AF_INET))
    raise LaunchError("no port on loopback can be had", hint="see ss -tln")


#: LMDeploy's cache is a share of what is free just then, which is not what the plan counted where
#: others have grown, or sleep and will take more.
RATIO: Final = "--cache-max-entry-count"
#: Steps in a ratio: one is 24 KiB of 24 GiB.
_STEPS: Final = 10**6


def fitted_ratio(plan: Plan, group: int, free: Mapping[str, int]) -> float:
    """The ratio that gives the cache of a group's engine its bytes; the plan's where it cannot.

    LMDeploy takes the ratio of the free memory of the fullest card in the group. Over: by less than
    a step, so that no page is lost. ``free`` are bytes by GPU UUID that are free before the engine
    starts.
    """
    group_plan, members = plan.of_group(group), plan.parallel.groups[group]
    ratio, region = group_plan.settings.cache_max_entry_count, group_plan.kv.region_bytes
    # Cards of other groups hold what their engines have by now.
    gpus = [gpu for gpu in group_plan.gpus if gpu.index in members]
    if not ratio or not region or not any(gpu.uuid in free for gpu in gpus):
        return ratio
    planned = [free_for_cache(gpu) for gpu in gpus]
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
    """The ratio of a start on real GPUs: the plan's bytes where more is free than planned.

    Where less is free it is the plan's, so that what somebody took comes from the cache, too.
    Over: by what others give back between this look and LMDeploy's, while the engine loads.
    """
    planned = plan.of_group(group).settings.cache_max_entry_count
    return min(planned, shared_ratio(plan, group))


def shared_ratio(plan: Plan, group: int) -> float:
    """The ratio of a start beside other models of ours: the plan's bytes, whatever is free.

    Under: by a share of what others grow by within their parts of the cards while the engine loads;
    and two engines that start again at once do not know of each other.
    """
    from turbofit.launch.serve.gpu_monitor import used_now

    used = used_now(plan)
    gpus = [gpu for gpu in plan.gpus if gpu.index in used]  # the others cannot be read
    free = {gpu.uuid: gpu.total - gpu.reserved - used[gpu.index] for gpu in gpus}
    return fitted_ratio(plan, group, free)
