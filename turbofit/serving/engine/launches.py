"""Says how each engine of a plan is started: its command, environment, port and cache ratio."""

from __future__ import annotations

import os
import random
import shutil
import socket
import sys
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import ceil
from operator import add
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import LaunchError, PackageError
from turbofit.core.installation import install_command, installed, without_gpu
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.network import DEFAULT_PORT, port_problem
from turbofit.core.struct import Struct
from turbofit.core.units import round_up
from turbofit.core.version import REFERENCE
from turbofit.memory.engines import LMDEPLOY
from turbofit.memory.versions import OLDEST_SERVED, release
from turbofit.planning.commands import module_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.plan import Command, Plan
    from turbofit.rehearsal.pretend.clock import ClockFile
    from turbofit.rehearsal.pretend.scenario import Scenario
    from turbofit.rehearsal.pretend.usage import TimelineReader
    from turbofit.rehearsal.turbomind.ledger import CallSites, Ledger
    from turbofit.serving.engine.gemm_tuning import GemmTuning
    from turbofit.serving.engine.process import Spawn


_LOG: Final = LazyLogger(__name__)


class Lmdeploy(NamedTuple):
    """The LMDeploy that would be launched: its version and the words that start it."""

    version: str
    argv: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """A warning if plans are made for another version of LMDeploy than this; None otherwise."""
        actual, planned = release(self.version), release(REFERENCE)
        if actual == planned:
            return None
        how = "newer" if actual > planned else "older"
        return f"LMDeploy {self.version} is {how} than {REFERENCE}, which the plan's account is for"


def find_lmdeploy() -> Lmdeploy:
    """Find the LMDeploy of this interpreter, without importing it.

    Raises:
        PackageError: it is missing or too old.
    """
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
    """Find LMDeploy; if it is missing and another engine may be chosen, return it without ``argv``.

    Raises:
        PackageError: LMDeploy is missing or too old, and ``engine`` is one of its engines.
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
    """The command and environment of one start of an engine.

    ``timeline`` is the file that pretend GPUs write, or its folder if several processes write one;
    None on real GPUs. ``clock`` makes forwards take their time on pretend GPUs.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    timeline: Path | None = None
    clock: ClockFile | None = None


@dataclass
class Launch:
    """An engine on real GPUs, which can be started again and again.

    ``group`` is the engine's place in the plan. ``runner`` are the words that start LMDeploy, and
    replace the command's first word. A ``key`` that is not in the command is given to the engine in
    its environment. ``ratio`` returns the cache ratio of each start; with None the command's is
    used. ``images`` are the variables that say how the engine's process prepares images. ``spawn``
    starts the process; None means `core.process.processes.child`. ``tuning`` keeps the GEMM tuning;
    None keeps nothing.
    """

    command: Command
    runner: Sequence[str]
    key: str | None = None
    _: KW_ONLY
    group: int = 0
    ratio: Callable[[], float] | None = None
    spawn: Spawn | None = None
    images: Mapping[str, str] | None = None
    tuning: GemmTuning | None = None

    @property
    def port(self) -> int:
        return port_of(self.command)

    def start_command(self, number: int) -> StartCommand:  # noqa: ARG002 - a pretend launch needs it
        """Return the command, environment and timeline of the start with this number, from 0."""
        return StartCommand(self.argv(), self.environment({**os.environ, **self.command.env}))

    def argv(self) -> tuple[str, ...]:
        words = tuple(self.command.argv[1:])
        return (*self.runner, *(words if self.ratio is None else with_ratio(words, self.ratio())))

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return ``base`` with the engine's variables, and its API key if the command has none.

        Unless ``base`` sets it, RAY_ADDRESS is "local": the ranks of LMDeploy's PyTorch engine
        would otherwise join a Ray cluster of this host, and take GPUs that the plan does not name.
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


def free_ports(count: int, holders: ExitStack, besides: int | None = None) -> list[int]:
    """Return ``count`` free ports on loopback, all different from ``besides``, and hold them.

    Until ``holders`` closes, a bound socket that does not listen keeps each port from programs that
    look for a free one. An engine sets SO_REUSEADDR, so it can listen at its port. Where the system
    does not allow that, the ports are not held. The ports are below the range that the kernel uses
    for outgoing connections. Before the engine listens, the kernel may give a port of that range to
    any client, even to turbofit's own request to the engine.

    Raises:
        LaunchError: too few ports are free, or no socket can be made.
    """
    from turbofit.gateway.server import tcp_socket

    ports: list[int] = []
    endpoint = holders.enter_context(tcp_socket(socket.AF_INET))
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if port == besides:
            continue
        with suppress(OSError):  # the port is in use: the same socket tries the next one
            endpoint.bind((HOST, port))
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if port_problem(HOST, port) is not None:  # no engine could listen (gVisor's network)
                endpoint.close()
            ports.append(port)
            if len(ports) == count:
                return ports
            endpoint = holders.enter_context(tcp_socket(socket.AF_INET))
    raise LaunchError("no port on loopback can be had", hint="see ss -tln")


#: LMDeploy's option for the share of free memory that becomes the cache. The memory that is free
#: then is not what the plan counted if others have grown, or sleep and will take more.
RATIO: Final = "--cache-max-entry-count"
#: Steps in a ratio: one is 24 KiB of a card with 24 GiB.
_STEPS: Final = 10**6


def fitted_ratio(plan: Plan, group: int, free: Mapping[str, int]) -> float:
    """Return the cache ratio with which a group's engine gets the planned bytes of its cache.

    LMDeploy applies the ratio to the free memory of the group's fullest card. The ratio is rounded
    up, so that no page is lost. If no GPU of the group is in ``free``, or if a ratio of 1 or more
    would be needed, the plan's ratio is returned. ``free``: free bytes by GPU UUID before the
    engine starts.
    """
    engine = plan.engines[group]
    ratio, region = engine.settings.cache_max_entry_count, engine.kv.region_bytes
    # Cards of other groups hold what their engines have taken by now.
    gpus = engine.ledgers
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
    """Return the cache ratio for a start on real GPUs: the plan's, or a lower one.

    If more memory is free than planned, a lower ratio gives the cache its planned bytes. If less is
    free, the plan's ratio lets the cache shrink with the free memory. If other
    processes free memory during loading, before LMDeploy sizes the cache, the cache is too large.
    """
    planned = plan.engines[group].settings.cache_max_entry_count
    return min(planned, shared_ratio(plan, group))


def shared_ratio(plan: Plan, group: int) -> float:
    """Return the cache ratio that gives a cache its planned bytes on GPUs that other servers share.

    The ratio is too low if other servers grow during loading within the memory planned for them.
    The memory of an engine that starts at the same time is not considered.
    """
    from turbofit.serving.gpu_monitor import used_now

    used = used_now(plan)
    gpus = [gpu for gpu in plan.ledgers if gpu.index in used]  # other GPUs cannot be read
    free = {gpu.uuid: gpu.usable - used[gpu.index] for gpu in gpus}
    return fitted_ratio(plan, group, free)


def with_checkpoint(plan: Plan, folder: Path) -> Plan:
    """Return the plan with a checkpoint on disk: the model's own, or a twin made in ``folder``.

    A twin has a checkpoint's headers without weights; its folder has the name of the model.

    Raises:
        UsageError: the model's own checkpoint is needed, and it is not on disk.
    """
    from turbofit.rehearsal.checkpoint.twin import checkpoint_for

    name = (plan.model.hub_id or plan.model.name).rpartition("/")[2]
    torch = plan.backend.on_torch
    # LMDeploy chooses chat templates by the folder's name.
    checkpoint = checkpoint_for(plan.model, folder / name, torch=torch)
    source = replace(plan.model.source, checkpoint=str(checkpoint))
    return replace(plan, model=replace(plan.model, source=source))


def pretend_runner(plan: Plan) -> tuple[str, ...]:
    torch = plan.backend.on_torch
    return module_runner(
        module_of(plan.backend) if torch else "turbofit.rehearsal.turbomind.server"
    )


def pretend_machine(plan: Plan, group: int) -> Scenario:
    """Return the pretend machine of one group's GPUs.

    Memory that only a real card would use is counted as used there, as in a rehearsal.
    """
    from turbofit.rehearsal.planned import charged

    return charged(plan, group)


@dataclass(kw_only=True)
class PretendLaunch(Launch):
    """An engine on pretend GPUs: LMDeploy's own server and engine, which compute nothing.

    Each start has a machine of its own, whose scenario and timeline go into ``folder``. Once the
    engine is ready, its forwards take ``factor`` times the forecast's seconds.
    """

    plan: Plan
    folder: Path
    factor: float = 0.0

    def start_command(self, number: int) -> StartCommand:
        from turbofit.rehearsal.plan_clock import step_table
        from turbofit.rehearsal.pretend.clock import CLOCK, ClockFile
        from turbofit.rehearsal.turbomind.server import server_environment

        folder, argv = self.folder / f"{self.group}-{number}", self.argv()
        shutil.rmtree(self.folder / f"{self.group}-{number - 1}", ignore_errors=True)
        machine = pretend_machine(self.plan, self.group)
        if self.plan.backend.on_torch:
            env = self._torch_environment(machine, folder, {**os.environ, **self.command.env})
            return StartCommand(argv, self.environment(env), folder)
        env = server_environment(machine, folder)
        clock = ClockFile(folder / "clock", self.factor) if self.factor else None
        if clock is not None:
            clock.write(step_table(self.plan, self.plan.engines[self.group]))
            env[CLOCK] = str(clock.path)
        return StartCommand(argv, self.environment(env), folder / "timeline", clock)

    def _torch_environment(
        self, machine: Scenario, folder: Path, base: Mapping[str, str]
    ) -> dict[str, str]:
        """Make ``folder``; return an environment in which LMDeploy's server finds pretend cards."""
        from turbofit.rehearsal.packages import SERVED, need_engine
        from turbofit.rehearsal.pretend.command import cuda_site, find_turbofit, put_first
        from turbofit.rehearsal.pretend.run import prepare

        plan, path = self.plan, dict(base)
        need_engine(plan)
        if plan.backend.of_lmdeploy:
            put_first(path, "PYTHONPATH", str(SERVED))
            find_turbofit(path)
        prepared = prepare(machine, folder, path, site=cuda_site())
        alone = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "RAY_ADDRESS": "local"}
        return {**prepared.env, **alone}


class PretendUsage(Struct):
    """Bytes in use on one pretend GPU: the peak, the use now, and the executor pool's peak.

    ``pool`` is rounded up to the pool's steps, as in the plan; None for an engine without one.
    """

    gpu: int
    peak: int
    in_use: int
    pool: int | None


class PretendReader:
    """Reads how much memory one start of a group's engine uses on its pretend GPUs.

    ``timeline`` is `StartCommand.timeline`. Each reading of TurboMind's timeline begins
    where the last reading ended.
    """

    def __init__(self, plan: Plan, group: int, timeline: Path) -> None:
        self.timeline = timeline
        self._plan, self._group = plan, group
        #: The supervisor's thread and the gateway's both read the timeline.
        self._reading = Lock()
        self._ledger: Ledger | None = None
        self._events: TimelineReader | None = None

    @cached_property
    def _machine(self) -> Scenario:
        return pretend_machine(self._plan, self._group)

    def usages(self) -> tuple[PretendUsage, ...]:
        """Return the use of each of the group's pretend GPUs so far; empty if it cannot be read."""
        with self._reading:
            sizes = self._torch_held() if self._plan.backend.on_torch else self._turbomind_held()
        indices = self._plan.groups[self._group]
        others = [gpu.used + gpu.late for gpu in self._machine.gpus]
        return tuple(
            PretendUsage(gpu=index, peak=before + peak, in_use=before + now, pool=pool)
            for index, before, (peak, now, pool) in zip(indices, others, sizes, strict=False)
        )

    def _turbomind_held(self) -> list[tuple[int, int, int | None]]:
        """Return the peak, the use now, and the executor pool's peak of each GPU, in bytes."""
        ledger = self._read()
        sizes: list[tuple[int, int, int | None]] = []
        if ledger is None:
            return sizes
        for place, card in enumerate(ledger.cards):
            pool = ledger.executor_pool(place)
            most = max(pool.live_peak.values(), default=0) if pool else 0
            most = round_up(most, self._machine.pool_step)
            sizes.append((max(card.peak.values(), default=0), card.in_use, most))
        return sizes

    def _torch_held(self) -> list[tuple[int, int, int | None]]:
        from turbofit.rehearsal.pretend.run import PreparedRun
        from turbofit.rehearsal.pretend.usage import read_shared

        try:
            shared = read_shared(PreparedRun(self.timeline).shared)
        except (OSError, ValueError):
            return []
        sizes = (
            sum(size for _, size in shared.holders(place))
            for place in range(len(self._machine.gpus))
        )
        return [(peak, size, None) for peak, size in zip(shared.peak, sizes, strict=False)]

    @cached_property
    def _sites(self) -> CallSites:
        from turbofit.rehearsal.packages import engine_library
        from turbofit.rehearsal.pretend.elf import Symbols
        from turbofit.rehearsal.turbomind.ledger import CallSites

        return CallSites(Symbols(engine_library()).name)

    def _read(self) -> Ledger | None:
        """Return TurboMind's ledger so far; None if the timeline cannot be read."""
        from turbofit.rehearsal.pretend.usage import TimelineReader
        from turbofit.rehearsal.turbomind.ledger import Ledger

        if self._ledger is None or self._events is None:
            cards, step = len(self._machine.gpus), self._machine.pool_step
            self._ledger = Ledger(cards, self._sites, step)
            self._events = TimelineReader(self.timeline)
        try:
            return self._ledger.read(self._events.new_events())
        except (OSError, ValueError, LookupError):
            self._ledger = None  # an event may be half read: the next reading begins anew
            return None
