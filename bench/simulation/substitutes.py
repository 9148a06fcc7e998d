"""Puts the simulated world in the place of the operating system, in turbofit's modules only.

What is replaced: the modules ``time`` and ``threading``'s events, starting a process, loopback
HTTP to engines, NVML, the kernel's counters, ports, flocks of dead processes, writes to the disk,
uvicorn's server, and planning by an equal but remembered plan. Everything between is turbofit's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import pkgutil
import sys
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest.mock import patch

import msgspec

from bench.simulation.engine import SimulatedEngineProcess
from bench.simulation.gateway import SimulatedGatewayThread
from bench.simulation.loop import SimulatedSocket
from bench.simulation.machine import SimulatedNvml
from bench.simulation.modules import (
    DiskOs,
    LeaseOs,
    SimulatedThreading,
    SimulatedTime,
    SupervisorTime,
    TornWrite,
    current,
    world,
)
from bench.simulation.plans import remembered
from bench.simulation.scheduler import Event
from turbofit.core.errors import LaunchError
from turbofit.core.plan import Remedy
from turbofit.core.process import files
from turbofit.launch.engine.environment import Lmdeploy
from turbofit.launch.engine.image import flat_png
from turbofit.launch.engine.supervised_engine import SupervisedEngine
from turbofit.launch.serve import planner
from turbofit.launch.serve.gpu_monitor import GpuMonitor
from turbofit.launch.serve.supervisor import StopSignal, Supervisor
from turbofit.tuner.explain.remedies import Remedies

if TYPE_CHECKING:
    from bench.simulation.world import World

__all__ = ["in_place"]

_LMDEPLOY = Lmdeploy("0.18.0", ("python",))
_HELPS = Remedies((Remedy(change="more memory", effect="fits (not searched for here)"),), ())
_ROOMS = (
    "turbofit.core", "turbofit.gateway", "turbofit.launch.serve", "turbofit.launch.engine",
    "turbofit.launch.models",
    "turbofit.cli", "turbofit.planning", "turbofit.machine", "turbofit.observe",
)  # fmt: skip


@cache
def _modules() -> tuple[types.ModuleType, ...]:
    """All modules of the rooms that run; imported before anything is replaced."""
    for room in _ROOMS:
        package = importlib.import_module(room)
        for found in pkgutil.walk_packages(package.__path__, f"{room}."):
            importlib.import_module(found.name)
    return tuple(module for name, module in sys.modules.items() if name.startswith("turbofit."))


def _call(self: Any, method: str, path: str, body: Any = None, *, timeout: float) -> Any:
    """`launch.engine.engine_client.EngineClient.call` over the simulated loopback."""
    one = world()
    engine = one.machine.ports.get(self._port)
    if engine is None or not engine.listening:
        raise ConnectionRefusedError(111, "Connection refused (simulated)")
    done, seen = Event(one.scheduler), []

    def answer(kind: str, value: Any) -> None:
        seen.append((kind, value))
        if kind in ("whole", "lost"):
            done.set()

    data = b"" if body is None else msgspec.json.encode(body)
    exchange = engine.take(method, path, data, answer)
    if not done.wait(timeout):
        exchange.left()
        raise TimeoutError("timed out (simulated)")
    if seen[-1][0] == "lost":
        raise ConnectionResetError(104, "reset (simulated)")
    return seen[-1][1]


def _port_problem(_: str, port: int) -> str | None:
    return f"port {port} cannot be used: in use" if port in world().machine.ports else None


def _check_port(host: str, port: int) -> None:
    problem = _port_problem(host, port)
    if problem is not None:
        raise LaunchError(problem, hint="choose another")


def _free_ports(count: int, besides: int | None = None) -> list[int]:
    one, found = world(), list[int]()
    while len(found) < count:
        port = 20000 + one.rng.randrange(5000)
        if port not in one.machine.ports and port not in (besides, *found):
            found.append(port)
    return found


@contextmanager
def _no_overlay(plan: Any, base: Any = None) -> Iterator[Path]:  # noqa: ARG001
    yield Path("/models/m")


def _replace_file(real: Any, disk: DiskOs) -> Any:
    """`core.process.files._replace` on the simulated disk: full, slow, or torn by an end.

    Nobody reads while it writes: all but one in fifty are written in place, in three system calls.
    """

    def _replace(target: Path, raw: bytes, mode: int | None) -> None:
        one = world()
        process = one.scheduler.process
        one.machine.write_fault()
        if one.machine.disk_seconds and process is not None:
            one.scheduler.sleep(one.machine.disk_seconds)
        if one.tear_next and process is not None:
            one.tear_next = False
            # Half is written when the kernel ends it, before what would make it whole.
            disk.torn = True
            with suppress(TornWrite):
                real(target, raw[: len(raw) // 2], mode)
            disk.torn = False
            one.trace(f"turbofit {process.pid} is killed in the middle of a write")
            one.kill(process)
            one.scheduler.sleep(0.0)  # and its thread never goes on
        if next(_WRITES) % 50:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode or 0o644)
            os.write(descriptor, raw)
            os.close(descriptor)
        else:
            real(target, raw, mode)

    return _replace


_WRITES, _NAMES = itertools.count(), itertools.count()


_drawn = cache(flat_png)
_VERSION = importlib.metadata.version


@cache
def _found_version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return _VERSION(name)
    return None


_found_module = cache(importlib.util.find_spec)


def _version(name: str) -> str:
    """``importlib.metadata.version``, which looks through all packages each time."""
    found = _found_version(name)
    if found is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return found


def _live(pid: int) -> int:
    """`launch.engine.proc.start_time` of a simulated process."""
    return pid * 100 if pid in world().machine.engines else 0


def _members(group: int, started: int) -> list[int]:
    """`launch.engine.proc.members` of a simulated engine."""
    return [group] if started and _live(group) == started else []


_END_RUN = StopSignal.end


def _end_run(self: Any, *number: Any) -> None:
    """`StopSignal.end`, at which the supervisor that it ends looks."""
    _END_RUN(self, *number)
    world().stir()


_FOLLOW = Supervisor._follow


def _follow(self: Any, *given: Any) -> Any:
    """`Supervisor._follow`, whose deadlines say when the supervisor looks again."""
    process = world().scheduler.process
    assert process is not None
    process.engines = self.engines
    return _FOLLOW(self, *given)


def _start(self: Any) -> None:
    """`threading.Thread.start` of turbofit's threads; the supervisor looks at what they found."""

    def body() -> None:
        self.run()
        world().stir()

    world().scheduler.thread(body)


_ENGINE, _SERVE = "turbofit.launch.engine", "turbofit.launch.serve"
#: What stands in whose place, by its import path.
_Replacements: TypeAlias = Iterator[tuple[str, Any]]


def _threads() -> _Replacements:
    yield f"{_SERVE}.supervisor.time", SupervisorTime()
    yield f"{_SERVE}.supervisor.Supervisor._follow", _follow
    yield f"{_SERVE}.supervisor.StopSignal.end", _end_run
    for module, among in (
        ("engine.supervised_engine", ""), ("engine.engine_client", "probes"),
        ("serve.gpu_monitor", "monitors"), ("models.model_run", ""),
    ):  # fmt: skip
        yield f"turbofit.launch.{module}.threading", SimulatedThreading(among)
    for thread in (
        "engine.engine_client.Probe", "engine.supervised_engine._Pulse",
        "serve.gpu_monitor.GpuMonitor", "models.model_run._RunThread",
    ):  # fmt: skip
        yield f"turbofit.launch.{thread}.start", _start


def _processes(one: World) -> _Replacements:
    """Engines, their loopback, and who lives."""
    yield f"{_ENGINE}.supervised_engine.EngineProcess", partial(SimulatedEngineProcess, one)
    yield f"{_ENGINE}.engine_client.EngineClient.call", _call
    yield "turbofit.planning.examine.scene.port_problem", _port_problem
    yield f"{_SERVE}.supervisor.check_port", _check_port
    yield "turbofit.launch.run.free_ports", _free_ports
    yield f"{_SERVE}.leases.start_time", _live
    yield f"{_SERVE}.record.start_time", lambda pid: pid
    yield f"{_SERVE}.leases.group_of", lambda pid: pid
    yield f"{_SERVE}.gpu_monitor.group_of", lambda pid: pid
    yield f"{_SERVE}.leases.members", _members


def _machine(one: World) -> _Replacements:
    """Cards, the kernel and the disk."""
    clock, disk, machine = SimulatedTime(), DiskOs(), one.machine
    yield "turbofit.machine.nvml_machine.measure", lambda _: machine.measured()
    yield "turbofit.machine.host.read_host", machine.host
    yield "turbofit.machine.nvml.Nvml", partial(SimulatedNvml, machine)
    for module in (f"{_SERVE}.gpu_monitor", "turbofit.machine.nvml_machine"):
        yield f"{module}.ask_driver", lambda question, _, **_given: question()
    yield f"{_SERVE}.gpu_monitor._heat", lambda _: []
    yield f"{_ENGINE}.kernel.host_kills", lambda: machine.host_kills
    yield f"{_ENGINE}.kernel.driver_errors", lambda _: ()
    yield f"{_ENGINE}.kernel.uptime", clock.monotonic
    yield "turbofit.core.process.locks.time", clock
    yield "turbofit.gateway.routing.deny_file.os", LeaseOs()
    yield "turbofit.gateway.routing.deny_file.secrets", one.secrets
    yield "turbofit.gateway.routing.deny_file.time", clock
    yield f"{_SERVE}.leases.os", LeaseOs()
    yield f"{_SERVE}.record.os", LeaseOs()
    yield "turbofit.core.process.files.os", disk
    yield "turbofit.core.process.files.token_hex", lambda _: str(next(_NAMES))
    yield "turbofit.core.process.files._replace", _replace_file(files._replace, disk)
    yield "turbofit.core.process.files.sync_folder", lambda _: None


def _gateway(one: World) -> _Replacements:
    """The gateway's outside."""
    yield "turbofit.gateway.thread.GatewayThread", partial(SimulatedGatewayThread, one)
    yield "turbofit.gateway.server.bind", lambda _: types.SimpleNamespace(close=lambda: None)
    yield "turbofit.gateway.overlay.overlay", _no_overlay
    yield "turbofit.gateway.routing.upstream.engine_socket", SimulatedSocket
    yield "aiohttp.connector.monotonic", SimulatedTime().monotonic
    # What looks at nothing does so less often: a day has 86,400 seconds.
    yield "turbofit.gateway.routing.health._TICK", 600.0
    yield f"{_ENGINE}.engine_client._PAUSE", 300.0


def _installed_and_shown(one: World) -> _Replacements:
    yield "turbofit.launch.run.lmdeploy_if_needed", lambda _: (_LMDEPLOY, None)
    yield "turbofit.launch.run.WeightsFetcher", lambda _: lambda plan: plan
    yield "importlib.metadata.version", _version
    yield "importlib.util.find_spec", _found_module
    yield "turbofit.cli.terminal.output.note", lambda text: one.trace(f"says {text}")
    yield "turbofit.cli.terminal.output.answer", lambda _: None


def _pure() -> _Replacements:
    """What is remembered, or is for people: a quarter of a day's processor time."""
    yield f"{_SERVE}.planner.best_plan", remembered(planner.best_plan)
    yield "turbofit.tuner.choose.remedies", lambda *_: _HELPS
    yield "turbofit.tuner.choose.speed_remedies", lambda *_: ()
    yield "turbofit.tuner.choose.limit_costs", lambda *_: ()
    yield f"{_ENGINE}.worst_requests.flat_png", _drawn


def _replacements(one: World) -> _Replacements:
    yield from _threads()
    yield from _processes(one)
    yield from _machine(one)
    yield from _gateway(one)
    yield from _installed_and_shown(one)
    yield from _pure()


@cache
def _place(path: str) -> tuple[Any, str]:
    """What has an attribute, and the attribute's name, by its import path."""
    owner, _, name = path.rpartition(".")
    return pkgutil.resolve_name(owner), name


def _put(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Until the stack ends; ``unittest.mock.patch`` looks every path up again, each day."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


@cache
def _with_clock() -> tuple[types.ModuleType, ...]:
    return tuple(one for one in _modules() if vars(one).get("time") is time)


@contextmanager
def in_place(one: World) -> Iterator[None]:
    """The world of one history in the place of the operating system."""
    clock = SimulatedTime()
    with ExitStack() as stack:
        for module in _with_clock():
            _put(stack, module, "time", clock)
        for path, value in _replacements(one):
            _put(stack, *_place(path), value)
        for made, defaults in (
            (Supervisor, {"clock": clock.monotonic}),
            (SupervisedEngine, {"clock": clock.monotonic}),
            (GpuMonitor, {"every": 1800.0}),
        ):
            stack.enter_context(patch.dict(made.__init__.__kwdefaults__, defaults))
        folders = {
            "XDG_STATE_HOME": str(one.folder), "TURBOFIT_LEASES": str(one.folder / "leases")
        }  # fmt: skip
        stack.enter_context(patch.dict(os.environ, folders, clear=True))
        current.append(one)
        try:
            yield
        finally:
            one.close()
            current.pop()
