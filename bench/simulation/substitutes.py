"""Replaces the operating system by the simulated world, in turbofit's modules only.

These are replaced: the module ``time``, ``threading``'s events, the start of processes, loopback
HTTP to engines, NVML, the kernel's counters, ports, flocks of dead processes, writes to the disk,
and uvicorn's server. Equal plans are remembered. Everything else is turbofit's own code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import pkgutil
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import msgspec

from bench.simulation.engine import SimulatedEngineProcess
from bench.simulation.gateway import SimulatedGatewayThread, SimulatedSocket
from bench.simulation.machine import SimulatedNvml
from bench.simulation.scheduler import Event
from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.plan import Remedy
from turbofit.core.png import png
from turbofit.core.process import files
from turbofit.core.process.signals import StopSignal
from turbofit.planning.remedies import Remedies
from turbofit.serving import planner
from turbofit.serving.engine.lmdeploy import Lmdeploy
from turbofit.serving.engine.supervised_engine import Supervision
from turbofit.serving.gpu_monitor import GpuMonitor
from turbofit.serving.supervisor import Supervisor

if TYPE_CHECKING:
    from bench.simulation.scheduler import Scheduler
    from bench.simulation.world import World

_LMDEPLOY = Lmdeploy("0.18.0", ("python",))
_HELPS = Remedies((Remedy(change="more memory", effect="fits (not searched for here)"),), ())
_ROOMS = (
    "turbofit.core", "turbofit.gateway", "turbofit.serving", "turbofit.serving.engine",
    "turbofit.cli", "turbofit.planning", "turbofit.machine", "turbofit.logs",
)  # fmt: skip


#: The world that everything belongs to at this moment.
current: list[World] = []


def world() -> World:
    """Return the world of the day that is simulated now."""
    return current[-1]


class _Module(types.ModuleType):
    """A copy of a module in which a subclass replaces some names."""

    def __init__(self, of: types.ModuleType) -> None:
        super().__init__(of.__name__)
        ours = {name for kind in type(self).__mro__[:-2] for name in vars(kind)}
        vars(self).update({name: one for name, one in vars(of).items() if name not in ours})


class SimulatedTime(_Module):
    """``time`` as turbofit's modules see it."""

    def __init__(self) -> None:
        super().__init__(time)

    def monotonic(self) -> float:
        return world().scheduler.now

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        return int(world().scheduler.now * 1e9)

    def time(self) -> float:
        one = world().scheduler
        return 1.8e9 + one.now + one.skew

    def sleep(self, seconds: float) -> None:
        world().scheduler.sleep(seconds)

    def strftime(self, form: str, when: Any = None) -> str:
        return time.strftime(form, when or time.gmtime(self.time()))


class SupervisorTime(SimulatedTime):
    """``time`` as the supervisor sees it; its pauses end when there is something to see."""

    def sleep(self, seconds: float) -> None:
        world().rest(seconds)


class _WakingEvent(Event):
    """An event that wakes the supervisor when it is set."""

    def set(self) -> None:
        super().set()
        world().stir()


class _PokedEvent(_WakingEvent):
    """An event whose waits the world can end early.

    Args:
        scheduler: virtual time.
        among: the events that are waited for now.
    """

    def __init__(self, scheduler: Scheduler, among: dict[Event, None]) -> None:
        super().__init__(scheduler)
        self._among = among

    def wait(self, timeout: float | None = None) -> bool:
        self._among[self] = None
        try:
            return super().wait(timeout)
        finally:
            self._among.pop(self, None)


class SimulatedThreading(_Module):
    """``threading`` with events in virtual time.

    Args:
        among: the attribute of `World` with the events whose waits it can end.
    """

    def __init__(self, among: str = "") -> None:
        super().__init__(threading)
        self._events = among

    def Event(self) -> Event:  # noqa: N802
        one = world()
        if self._events:
            return _PokedEvent(one.scheduler, getattr(one, self._events))
        return _WakingEvent(one.scheduler)


class TornWrite(Exception):  # noqa: N818 - no error: the kernel ends turbofit here
    pass


class DiskOs(_Module):
    """``os`` for `core.process.files`: a torn write does not come to its end."""

    def __init__(self) -> None:
        super().__init__(os)
        self.torn = False

    def replace(self, source: Any, target: Any) -> None:
        if self.torn:
            raise TornWrite
        os.replace(source, target)

    def unlink(self, path: Any) -> None:
        if not self.torn:
            os.unlink(path)

    def fsync(self, descriptor: int) -> None:
        """Do nothing, since the simulated disk loses nothing."""


class LeaseOs(_Module):
    """``os`` for the leases: files that a process has open are closed when it ends."""

    def __init__(self) -> None:
        super().__init__(os)

    def open(self, *arguments: Any, **named: Any) -> int:
        process = world().scheduler.process
        descriptor = os.open(*arguments, **named)
        if process is not None:
            process.descriptors.append(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        process = world().scheduler.process
        if process is not None and descriptor in process.descriptors:
            process.descriptors.remove(descriptor)
            os.close(descriptor)

    def fdopen(self, descriptor: int, *given: Any) -> Any:
        process = world().scheduler.process
        if process is not None:
            process.descriptors.remove(descriptor)
        return os.fdopen(descriptor, *given)

    def getpid(self) -> int:
        process = world().scheduler.process
        return process.pid if process is not None else 1

    def killpg(self, pid: int, number: int) -> None:
        engine = world().machine.engines.get(pid)
        if engine is None:
            raise ProcessLookupError(3, "No such process")
        engine.kill(number)


@cache
def _modules() -> tuple[types.ModuleType, ...]:
    """Import all modules that run, before any is replaced; return the modules of turbofit."""
    for room in _ROOMS:
        package = importlib.import_module(room)
        for found in pkgutil.walk_packages(package.__path__, f"{room}."):
            # A library for ctypes, and what imports LMDeploy: no server uses it.
            if not found.name.endswith((".libpixels", ".planned_pipeline")):
                importlib.import_module(found.name)
    return tuple(module for name, module in sys.modules.items() if name.startswith("turbofit."))


def _call(self: Any, path: str, body: Any = None, *, timeout: float) -> Any:
    """Replace `EngineClient.call` by a call over the simulated loopback."""
    one = world()
    engine = one.machine.ports.get(self.port)
    if engine is None or not engine.listening:
        raise ConnectionRefusedError(111, "Connection refused (simulated)")
    done, seen = Event(one.scheduler), []

    def answer(kind: str, value: Any) -> None:
        seen.append((kind, value))
        if kind in ("whole", "lost"):
            done.set()

    data = b"" if body is None else msgspec.json.encode(body)
    exchange = engine.take("GET" if body is None else "POST", path, data, answer)
    if not done.wait(timeout):
        exchange.left()
        raise TimeoutError("timed out (simulated)")
    if seen[-1][0] == "lost":
        raise ConnectionResetError(104, "reset (simulated)")
    return seen[-1][1]


def _port_problem(_: str, port: int) -> str | None:
    return f"port {port} cannot be used: in use" if port in world().machine.ports else None


def _free_ports(count: int, _: object, besides: int | None = None) -> list[int]:
    one, found = world(), list[int]()
    while len(found) < count:
        port = 20000 + one.rng.randrange(5000)
        if port not in one.machine.ports and port not in (besides, *found):
            found.append(port)
    return found


def _no_overlay(_plan: Any, _root: Any) -> Path:
    """Replace `make_overlay`, whose first act is to look for the checkpoint."""
    if world().machine.checkpoint_away:
        raise UsageError("the checkpoint is not on this machine (simulated)", hint="wait")
    return Path("/models/m")


def _replace_file(real: Any, disk: DiskOs) -> Any:
    """Replace `core.process.files._replace`: writes may fail, be slow, or be torn by a kill.

    Nobody reads during a write: all but one in fifty files are written in place, which is faster.
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


_drawn = cache(png)
_VERSION = importlib.metadata.version


@cache
def _found_version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return _VERSION(name)
    return None


_found_module = cache(importlib.util.find_spec)


def _version(name: str) -> str:
    """Replace ``importlib.metadata.version``, which searches all packages each time."""
    found = _found_version(name)
    if found is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return found


def _live(pid: int) -> int:
    """Replace `start_time`: return a made-up time for a living engine, 0 for others."""
    return pid * 100 if pid in world().machine.engines else 0


def _ask_driver(question: Any, _: Any, **_given: Any) -> Any:
    return question()


def _processor_seconds(group: int) -> float:
    """Replace `processor_seconds`: an engine that hangs uses none."""
    engine = world().machine.engines.get(group)
    return 0.0 if engine is None or engine.hung else world().scheduler.now


def _members(group: int, started: int) -> list[int]:
    """Replace `members`: a simulated engine is the only process of its group."""
    return [group] if started and _live(group) == started else []


_END_RUN = StopSignal.end


def _end_run(self: Any, *number: Any) -> None:
    """Replace `StopSignal.end`: it also wakes the supervisor."""
    _END_RUN(self, *number)
    world().stir()


_FOLLOW = Supervisor._follow


def _follow(self: Any, *given: Any) -> Any:
    """Replace `Supervisor._follow`: the world also learns of its engines, and their deadlines."""
    process = world().scheduler.process
    assert process is not None
    process.engines = self.engines
    return _FOLLOW(self, *given)


def _start(self: Any) -> None:
    """Replace `Thread.start`: the thread runs in virtual time; its end wakes the supervisor."""

    def body() -> None:
        self.run()
        world().stir()

    world().scheduler.thread(body)


_ENGINE, _SERVE = "turbofit.serving.engine", "turbofit.serving"


def _replacements(one: World) -> dict[str, Any]:
    """Return the replacements by import path."""
    clock, disk, machine = SimulatedTime(), DiskOs(), one.machine
    return {
        # Threads, and when they look.
        f"{_SERVE}.supervisor.time": SupervisorTime(),
        f"{_SERVE}.supervisor.Supervisor._follow": _follow,
        "turbofit.core.process.signals.StopSignal.end": _end_run,
        f"{_ENGINE}.engine_client.threading": SimulatedThreading("probes"),
        f"{_SERVE}.gpu_monitor.threading": SimulatedThreading("monitors"),
        f"{_ENGINE}.engine_client.Probe.start": _start,
        f"{_SERVE}.gpu_monitor.GpuMonitor.start": _start,
        # Engines, their loopback, and who lives.
        f"{_ENGINE}.supervised_engine.EngineProcess": partial(SimulatedEngineProcess, one),
        f"{_ENGINE}.engine_client.EngineClient.call": _call,
        "turbofit.planning.examine.scene.Sources.port_problem": staticmethod(_port_problem),
        "turbofit.serving.launch_description.free_ports": _free_ports,
        f"{_SERVE}.leases.start_time": _live,
        f"{_SERVE}.runs.start_time": lambda pid: pid,
        f"{_SERVE}.leases.group_of": lambda pid: pid,
        f"{_SERVE}.gpu_monitor.group_of": lambda pid: pid,
        f"{_SERVE}.leases.members": _members,
        f"{_ENGINE}.supervised_engine.processor_seconds": _processor_seconds,
        f"{_ENGINE}.supervised_engine.any_busy": lambda _: False,
        # Cards, the kernel and the disk.
        "turbofit.machine.nvml_machine.measure": lambda _: machine.measured(),
        "turbofit.machine.host.read_host": lambda: machine.host,
        "turbofit.machine.nvml.Nvml": partial(SimulatedNvml, machine),
        f"{_SERVE}.gpu_monitor.ask_driver": _ask_driver,
        "turbofit.machine.nvml_machine.ask_driver": _ask_driver,
        f"{_ENGINE}.supervised_engine.host_kills": lambda: machine.host_kills,
        "turbofit.core.process.files.time": clock,
        "turbofit.gateway.routing.deny_list.secrets": one.secrets,
        f"{_SERVE}.leases.os": LeaseOs(),
        f"{_SERVE}.runs.os": LeaseOs(),
        "turbofit.core.process.files.os": disk,
        "turbofit.core.process.files.token_hex": lambda _: str(next(_NAMES)),
        "turbofit.core.process.files._replace": _replace_file(files._replace, disk),
        "turbofit.core.process.files.sync_folder": lambda _: None,
        # The gateway's surroundings. Loops that find nothing run less often: a day is long.
        "turbofit.gateway.server.GatewayThread": partial(SimulatedGatewayThread, one),
        "turbofit.gateway.http.uvicorn_server.bind": lambda _: types.SimpleNamespace(
            close=lambda: None
        ),
        "turbofit.serving.overlay.make_overlay": _no_overlay,
        "turbofit.gateway.upstream.engine_socket": SimulatedSocket,
        "aiohttp.connector.monotonic": clock.monotonic,
        "turbofit.gateway.routing.health._TICK": 600.0,
        f"{_ENGINE}.engine_client._PAUSE": 300.0,
        # Installed packages, and messages for people.
        "turbofit.serving.run.lmdeploy_if_needed": lambda _: _LMDEPLOY,
        "turbofit.serving.launch_description.fetched": lambda model, _: model,
        "importlib.metadata.version": _version,
        "importlib.util.find_spec": _found_module,
        "turbofit.cli.terminal.output.note": lambda text: one.trace(f"says {text}"),
        "turbofit.cli.terminal.output.answer": lambda _: None,
        # What is remembered, or is for people: a quarter of a day's processor time.
        f"{_SERVE}.planner.best_plan": _remembered(planner.best_plan),
        f"{_SERVE}.planner.Planner._raised": _told(planner.Planner._raised),
        "turbofit.planning.choose.remedies": lambda *_: _HELPS,
        "turbofit.planning.choose.limit_costs": lambda *_: (),
        f"{_ENGINE}.worst_requests.png": _drawn,
    }


#: Plans and errors that were found, by what was asked; the oldest go.
_PLANS: dict[bytes, Any] = {}
_MOST_PLANS = 20_000


def _remembered(real: Any) -> Any:
    """Remember plans over all days: equal requests on equal machines have equal plans.

    Args:
        real: `planner.best_plan` itself.
    """

    def best_plan(
        request: Any,
        *,
        pretend: None,  # noqa: ARG001 - no world pretends
        promise: Any = None,
    ) -> Any:
        key = _question(request, promise)
        plan = _PLANS.get(key)
        if plan is None:
            plan = _found(real, request, promise)
        elif not isinstance(plan, TurbofitError):
            plan = _with_holders(plan, request.on)
        if key not in _PLANS:
            if len(_PLANS) >= _MOST_PLANS:
                del _PLANS[next(iter(_PLANS))]
            _PLANS[key] = plan
        if isinstance(plan, TurbofitError):
            raise plan.with_traceback(None)
        world().planned(plan)
        return plan

    return best_plan


def _told(real: Any) -> Any:
    """Tell the world of a plan with a raised ratio: engines may be started by it."""

    def raised(self: Any, request: Any, plan: Any) -> Any:
        made = real(self, request, plan)
        if made is not plan:
            world().planned(made)
        return made

    return raised


def _question(request: Any, promise: Any) -> bytes:
    """Return all that a plan depends on: request, promise, and the machine without its holders."""
    gpus = tuple(msgspec.structs.replace(one, holders=()) for one in request.on.gpus)
    bare = msgspec.structs.replace(request.on, gpus=gpus)
    asked = {name: one for name, one in request.given().items() if name != "on"}
    return msgspec.json.encode([bare, asked, promise], enc_hook=str)


def _found(real: Any, request: Any, promise: Any) -> Any:
    try:
        return real(request, promise=promise)
    except TurbofitError as exc:
        return exc


def _with_holders(plan: Any, machine: Any) -> Any:
    """Return a remembered plan with this machine's holders of memory."""
    holders = {one.uuid: one.holders for one in machine.gpus}
    gpus = tuple(
        msgspec.structs.replace(one, holders=holders[one.uuid]) for one in plan.machine.gpus
    )
    return msgspec.structs.replace(plan, machine=msgspec.structs.replace(plan.machine, gpus=gpus))


@cache
def _place(path: str) -> tuple[Any, str]:
    """Return the owner and the name of the attribute at an import path."""
    owner, _, name = path.rpartition(".")
    return pkgutil.resolve_name(owner), name


def _put(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Replace an attribute until the stack ends.

    ``unittest.mock.patch`` would look up every path again on each day.
    """
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
    """Replace the operating system by a world, until the end of the block."""
    clock = SimulatedTime()
    with ExitStack() as stack:
        for module in _with_clock():
            _put(stack, module, "time", clock)
        for path, value in _replacements(one).items():
            _put(stack, *_place(path), value)
        for made, defaults in (
            (Supervision, {"clock": clock.monotonic}),
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
