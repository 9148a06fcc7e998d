"""One start of one plan: overlay, engines, gateway, the watch over the GPUs, and the way back."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from turbofit.core.errors import LaunchError
from turbofit.core.process.progress import under_way
from turbofit.core.run_report import EngineRecord, RunMoment
from turbofit.launch.engine.environment import module_runner
from turbofit.launch.engine.fitted_cache import ratio_now
from turbofit.launch.engine.launches import Launch, PretendLaunch, free_ports
from turbofit.launch.serve.forecast_check import as_launched, beside, lines
from turbofit.launch.serve.gpu_monitor import (
    GpuMonitor,
    any_lost,
    memory_back,
    used_now,
    without,
)
from turbofit.launch.serve.start_progress import StartProgress
from turbofit.launch.serve.supervisor import Supervisor
from turbofit.planning.checks import refuse
from turbofit.planning.commands import commands, module_of, private_commands
from turbofit.planning.examine.scene import Scene, Sources

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from contextlib import ExitStack

    from turbofit.core.plan import Plan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.routing.engines import Outage
    from turbofit.launch.engine.supervised_engine import SupervisedEngine
    from turbofit.launch.run import Run
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.observe.ends import End

__all__ = ["PublicSide", "Start"]

_Answer = TypeVar("_Answer")

#: Phases of a start that are kept: restarts begin them again.
_MOMENTS: Final = 100


class PublicSide(Protocol):
    """Where clients reach a plan's gateway: an address of its own, or a part of a shared one."""

    @property
    def url(self) -> str:
        """The address."""

    def start(self) -> None:
        """Begin to serve; returns once it does.

        Raises:
            LaunchError: it cannot.
        """

    def call(self, ask: Callable[[Gateway], _Answer]) -> _Answer:
        """Run something in the gateway's loop, and return what it returns.

        Raises:
            LaunchError: it does not serve.
        """

    @property
    def cut(self) -> int:
        """How many requests its end has cut off."""

    def stop(self, *, drain: bool = True) -> None:
        """Take nothing new, and end; what is under way may end with ``drain``."""

    def strike(self) -> None:
        """Cut off what is under way; safe in a signal handler."""


class Start:
    """A plan, once.

    Args:
        run: what it is a start of.
        plan: what to launch.
        number: how many starts came before.
    """

    def __init__(self, run: Run, plan: Plan, number: int) -> None:
        self._run, self._plan, self._number = run, plan, number
        self._supervisor: Supervisor | None = None
        self._start_progress: StartProgress | None = None
        self._front: PublicSide | None = None
        self._gpu_monitor: GpuMonitor | None = None
        self._noted: tuple[list[int], bool, dict[str, int] | None] = ([], False, {})
        self._began = time.monotonic()
        self._moments: list[RunMoment] = []
        #: What the GPUs have in use without our engines.
        self._before: dict[int, int] = {}
        self.was_ready = False

    def run(self, stop: StopSignal, stack: ExitStack) -> signal.Signals:
        """Launch, serve, and come back by a signal.

        Args:
            stop: tells of signals.
            stack: takes what must be undone at the end.

        Raises:
            EndedError: an engine ended, and starting it again would not help.
            TurbofitError: something else is in the way.
        """
        from turbofit.launch.engine.pretended import localised
        from turbofit.machine.host import read_host

        run, config = self._run, self._run.config
        if config.pretend:
            self._plan = localised(self._plan, run.folder / "model")
        elif run.fetch is not None:
            self._plan = run.fetch(self._plan)
        if config.gateway is not None and run.publish is None:
            from turbofit.gateway.server import bind

            # Before minutes of loading; it is bound again, for good, when the engines are ready.
            bind(config.gateway).close()
        launches = self._launches(stack)
        ports = [launch.port for launch in launches]
        scene = Scene(
            Sources(), "start", host=read_host(), plan=self._plan, folder=run.folder, ports=ports,
            pretend=config.pretend,
        )  # fmt: skip
        for warning in refuse(scene):
            run.say(f"warning: {warning}")
        self._before = {} if config.pretend else used_now(self._plan)
        self._start_progress = StartProgress(self._plan, self._before, pretend=config.pretend)
        if run.examiner is not None:
            run.examiner.begin(self._plan)
        self._supervisor = Supervisor(
            self._plan, launches, run.folder, run.say,
            check=config.check, timing=config.timing, on_end=self._ended, on_rest=self._rest,
            examiner=run.examiner, explained=self._explained,
        )  # fmt: skip
        stop.on_second(self._strike)  # before the engines end: their requests are told why
        try:
            return self._supervisor.run(stop, self._open, self._tick, self._drain)
        finally:
            self._gone(self._before)

    def _launches(self, stack: ExitStack) -> list[Launch]:
        run, config, plan = self._run, self._run.config, self._plan
        key: str | None
        if config.gateway is None and run.examiner is None:
            name = config.client_name(plan.model)
            made = commands(plan, port=config.port, name=name, options=config.options)
            key = None
        else:
            from turbofit.gateway.overlay import overlay

            base = run.folder / f"overlay-{self._number}"
            folder = stack.enter_context(overlay(plan, base))
            stack.callback(_remove, base)
            name = config.client_name(plan.model)
            # The gateway listens once all engines are ready.
            public = None if config.gateway is None else config.gateway.port
            ports = free_ports(len(plan.parallel.groups), besides=public)
            # Hexadecimal: a key that begins with a dash would be read as an option.
            made = private_commands(plan, ports, str(folder), name, config.options)
            key = secrets.token_hex(32)
        self._key = key
        # Without a gateway the user's own key is on the command line already.
        hidden, key = key is not None, key or config.api_key
        if config.pretend:
            from turbofit.launch.engine.pretended import PretendFaults

            room = run.folder / f"pretend-{self._number}"
            first = None if self._number else config.pretend_fail
            shared = None if run.shared is None else run.shared.file(plan)
            return [
                PretendLaunch(
                    plan.of_group(one.group),
                    one,
                    room,
                    key,
                    hidden=hidden,
                    faults=PretendFaults(config.pretend_taken, first),
                    ratio=self._ratio(one.group),
                    shared=shared,
                )
                for one in made
            ]
        ours = module_runner(module_of(plan.engine))
        runner = run.lmdeploy.argv if plan.engine.of_lmdeploy else ours
        return [
            Launch(one, runner, key, hidden=hidden, ratio=self._ratio(one.group)) for one in made
        ]

    def _ratio(self, group: int) -> Callable[[], float] | None:
        """Gives each start of an engine its cache ratio; None: the plan's.

        Where other models of ours share the cards, a start takes the plan's cache whatever is free.
        """
        run, plan = self._run, self._plan
        if run.shared is not None:
            return partial(run.shared.ratio, plan, group)
        fixed = "cache_max_entry_count" in run.fixed
        return None if run.config.pretend or fixed else partial(ratio_now, plan, group)

    def _open(self, urls: list[str]) -> None:
        """All engines are ready: tell, compare, open."""
        run, plan, supervisor = self._run, self._plan, self._supervisor
        assert supervisor is not None
        self.was_ready = True
        self._tell_progress(supervisor)
        used = {} if run.config.pretend else used_now(plan)
        engines = []
        for engine in supervisor.engines:
            rows = beside(plan.of_group(engine.group), engine, used)
            for line in lines([row for row in rows if row.gpu is not None]):
                run.say(f"{engine.name}: {line}")
            spent = engine.spent()
            engines.append(EngineRecord(group=engine.group, seconds=spent, beside=tuple(rows)))
        cached = {engine.group: engine.tracker.cached_tokens() for engine in supervisor.engines}
        launched = as_launched(plan, cached)
        if run.config.gateway is not None:
            self._front = self._gateway(launched, urls)
            urls = [self._front.url]
        if not run.config.pretend:
            self._gpu_monitor = GpuMonitor(
                plan, self._pids, self._warn, fitted=run.shared is not None
            )
            self._gpu_monitor.start()
        run.record.attempt(engines=tuple(engines))
        run.record.state("ready", urls=tuple(urls))
        run.on_open(urls)

    def _gateway(self, plan: Plan, urls: list[str]) -> PublicSide:
        from msgspec.structs import replace

        from turbofit.gateway.http.accesslog import access_log
        from turbofit.gateway.routing.deny_file import deny_path
        from turbofit.gateway.server import make_gateway
        from turbofit.gateway.thread import GatewayThread

        run, serve_config = self._run, self._run.config
        assert serve_config.gateway is not None
        config = replace(
            serve_config.gateway,
            upstream_key=self._key,
            drain_seconds=serve_config.timing.drain,
            pretend=serve_config.pretend,
            grammars=run.lmdeploy.grammars or not plan.engine.of_lmdeploy,
            names=serve_config.names(plan),
            denied=deny_path(self._plan, run.lmdeploy.version, pretend=serve_config.pretend),
        )
        log = access_log(serve_config.access_log or str(run.folder / "access.log"))
        gateway = make_gateway(plan, urls, config, log=log, deny_list=run.deny_list)
        if run.deny_list is None:
            gateway.deny_list.file.tell(run.say)
        run.deny_list = gateway.deny_list
        assert self._supervisor is not None
        for engine, started in zip(gateway.engines, self._supervisor.engines, strict=True):
            engine.start_seconds = started.start_seconds
            if serve_config.check:
                engine.succeeded()  # it has just answered: /health need not wait for a question
        front: PublicSide = (run.publish or GatewayThread)(gateway)
        run.front = front
        front.start()
        return front

    def _tick(self) -> None:
        """Keep the lease true: which processes are ours, and whether they still grow.

        What a full disk did not take of it, or of the record, is written again.
        """
        supervisor = self._supervisor
        # An engine that is started again, or rests, takes again what it will need.
        noted = (self._pids(), self._ready, self._surplus())
        real = not self._run.config.pretend  # others need not know of pretend GPUs
        if real and (noted != self._noted or self._run.leases.unwritten):
            self._noted = noted
            pids, ready, surplus = noted
            name = self._plan.model.name
            self._run.leases.note(model=name, engines=pids, ready=ready, surplus=surplus)
        if self._run.record.unwritten:
            self._run.record.keep()
        if supervisor is not None:
            phases = dict.fromkeys(engine.tracker.phase for engine in supervisor.engines)
            self._enter(", ".join(phases))
            self._tell_progress(supervisor)

    def _tell_progress(self, supervisor: Supervisor) -> None:
        if self._start_progress is not None:
            examined = self._run.examiner is not None
            self._start_progress.look(supervisor.engines, examined=examined)

    @property
    def _ready(self) -> bool:
        """Whether all engines serve."""
        supervisor = self._supervisor
        return supervisor is not None and all(one.state == "ready" for one in supervisor.engines)

    def _enter(self, phase: str) -> None:
        """Note when a phase was first seen, and what the GPUs had in use then."""
        if self._moments and self._moments[-1].phase == phase:
            return
        used = {} if self._run.config.pretend else used_now(self._plan)
        at = round(time.monotonic() - self._began, 3)
        by_index = {str(index): size for index, size in used.items()}
        self._moments.append(RunMoment(phase=phase, at=at, used=by_index))
        del self._moments[:-_MOMENTS]
        self._run.record.attempt(moments=tuple(self._moments))

    def _strike(self) -> None:
        if self._front is not None:
            self._front.strike()

    def _drain(self, urgent: bool) -> None:
        if self._gpu_monitor is not None:
            self._gpu_monitor.stop()
        if self._front is not None:
            if not urgent:
                self._run.say("draining: what is under way may end")
            with under_way("draining"):
                self._front.stop(drain=not urgent)
        if self._run.shared is not None:
            # Others have come and gone since the launch: ours must go from what is there now.
            ours = self._ready and not self._run.config.pretend
            self._before = without(self._plan, used_now(self._plan)) if ours else {}

    def _gone(self, before: dict[int, int]) -> None:
        """The engines are gone: so must be their memory."""
        late = memory_back(self._plan, before) if before else []
        for text in late:
            self._run.say(f"warning: {text}")
        if before and not late:
            self._run.say("the GPUs' memory is back")
        assert self._supervisor is not None
        restarts = sum(max(0, engine.starts - 1) for engine in self._supervisor.engines)
        self._run.record.attempt(memory_back=not late, restarts=restarts)

    def _pids(self) -> list[int]:
        supervisor = self._supervisor
        if supervisor is None:
            return []
        return [engine.process.pid for engine in supervisor.engines if engine.process is not None]

    def _surplus(self) -> dict[str, int] | None:
        """Bytes by GPU UUID that caches hold beyond the plan: more was free than it counted on.

        None where the engines do not tell.
        """
        if self._supervisor is None:
            return {}
        surplus: dict[str, int] = {}
        for engine in self._supervisor.engines:
            beyond = engine.tracker.cache_surplus
            if beyond is None:
                return None
            if beyond:
                surplus |= dict.fromkeys(self._uuids(engine), beyond)
        return surplus

    def _uuids(self, engine: SupervisedEngine) -> list[str]:
        """Of the GPUs that an engine is on."""
        members = self._plan.parallel.groups[engine.group]
        return [gpu.uuid for gpu in self._plan.gpus if gpu.index in members]

    def _ended(self, engine: SupervisedEngine, ending: End) -> None:
        died = f"{engine.name}: {ending.error.message}"
        self._run.record.event("ended", died)
        self._run.on_death(died)
        if self._front is not None and self._supervisor is not None:
            index = self._supervisor.engines.index(engine)
            other = self._other_cause(engine, ending)
            with suppress(LaunchError):  # what it died of is not noted
                self._front.call(lambda gateway: gateway.engine_ended(index, other_cause=other))

    def _other_cause(self, engine: SupervisedEngine, ending: End) -> bool:
        """Whether no request can have ended an engine."""
        uuids, monitor = self._uuids(engine), self._gpu_monitor
        taken = monitor is not None and monitor.without_headroom(uuids)
        if ending.kind == "out_of_memory" and taken:
            return True
        return ending.kind == "killed" or any_lost(uuids)

    def _explained(self, index: int, seconds: float) -> int:
        """Ends of an engine by requests that the gateway refuses since."""
        deny_list = self._run.deny_list
        return 0 if deny_list is None else deny_list.explained(index, seconds)

    def _rest(self, outage: Outage | None) -> None:
        """No engine runs for a while, or one is started again: clients are told."""
        if outage is not None:
            self._run.record.event("resting", outage.message)
        if self._front is not None:
            try:
                self._front.call(lambda gateway: gateway.rest(outage))
            except LaunchError as exc:  # clients are told that none is up, not for how long
                self._warn("gateway", exc.message)

    def _warn(self, kind: str, text: str) -> None:
        self._run.say(f"warning: {text}")
        self._run.record.event(kind, text)


def _remove(folder: Any) -> None:
    with suppress(OSError):
        folder.rmdir()
