"""One start of one plan: overlay, engines, gateway, the watch over the GPUs, and the way back."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError
from turbofit.core.plan import Command
from turbofit.core.process.progress import under_way
from turbofit.core.run_report import EngineRecord, RunMoment
from turbofit.launch.engine.launches import Launch, PretendLaunch, free_ports
from turbofit.launch.engine.runner import module_runner
from turbofit.launch.serve.forecast_check import as_launched, beside, lines
from turbofit.launch.serve.gpu_monitor import (
    GpuMonitor,
    any_lost,
    memory_back,
    used_now,
    without,
)
from turbofit.launch.serve.shared_cards import ratio_now
from turbofit.launch.serve.start_progress import StartProgress
from turbofit.launch.serve.supervisor import Server
from turbofit.planning.checks import refuse
from turbofit.planning.commands import commands, module_of, private_commands, refuse_options
from turbofit.planning.examine.scene import Scene, Sources

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from contextlib import ExitStack

    from turbofit.core.plan import Plan
    from turbofit.gateway.routing.engines import Outage
    from turbofit.launch.engine.supervised_engine import SupervisedEngine
    from turbofit.launch.serve.job import Job, PublicSide
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.observe.ends import End

__all__ = ["Attempt"]

#: Phases of an attempt that are kept: restarts begin them again.
_MOMENTS: Final = 100


class Attempt:
    """A plan, once.

    Args:
        job: the run.
        plan: what to launch.
        number: how many attempts came before.
    """

    def __init__(self, job: Job, plan: Plan, number: int) -> None:
        self._job, self._plan, self._number = job, plan, number
        self._server: Server | None = None
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

        job, config = self._job, self._job.config
        if config.pretend:
            self._plan = localised(self._plan, job.folder / "model")
        elif job.fetch is not None:
            self._plan = job.fetch(self._plan)
        if config.gateway is not None and job.publish is None:
            from turbofit.gateway.server import bind

            # Before minutes of loading; it is bound again, for good, when the engines are ready.
            bind(config.gateway).close()
        launches = self._launches(stack)
        ports = [launch.port for launch in launches]
        scene = Scene(
            Sources(), "start", host=read_host(), plan=self._plan, folder=job.folder, ports=ports,
            pretend=config.pretend,
        )  # fmt: skip
        for warning in refuse(scene):
            job.say(f"warning: {warning}")
        self._before = {} if config.pretend else used_now(self._plan)
        self._start_progress = StartProgress(self._plan, self._before, pretend=config.pretend)
        if job.examiner is not None:
            job.examiner.begin(self._plan)
        self._server = Server(
            self._plan, launches, job.folder, job.say,
            check=config.check, timing=config.timing, on_end=self._ended, on_rest=self._rest,
            examiner=job.examiner, explained=self._explained,
        )  # fmt: skip
        stop.on_second(self._strike)  # before the engines end: their requests are told why
        try:
            return self._server.run(stop, self._open, self._tick, self._drain)
        finally:
            self._gone(self._before)

    def _launches(self, stack: ExitStack) -> list[Launch]:
        job, config, plan = self._job, self._job.config, self._plan
        key: str | None
        refuse_options(plan.engine, config.options)
        if config.gateway is None and job.examiner is None:
            name = config.client_name(plan.model)
            made, key = commands(plan, port=config.port, name=name), None
        else:
            from turbofit.gateway.overlay import overlay

            base = job.folder / f"overlay-{self._number}"
            folder = stack.enter_context(overlay(plan, base))
            stack.callback(_remove, base)
            name = config.client_name(plan.model)
            # The gateway listens once all engines are ready.
            public = None if config.gateway is None else config.gateway.port
            ports = free_ports(len(plan.parallel.groups), besides=public)
            # Hexadecimal: a key that begins with a dash would be read as an option.
            made = private_commands(plan, ports, str(folder), name)
            key = secrets.token_hex(32)
        full = [
            Command(env=one.env, argv=(*one.argv, *config.options), group=one.group) for one in made
        ]
        self._key = key
        # Without a gateway the user's own key is on the command line already.
        hidden, key = key is not None, key or config.api_key
        if config.pretend:
            from turbofit.launch.engine.pretended import PretendFaults

            room = job.folder / f"pretend-{self._number}"
            first = None if self._number else config.pretend_fail
            shared = None if job.shared is None else job.shared.file(plan)
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
                for one in full
            ]
        ours = module_runner(module_of(plan.engine))
        runner = job.lmdeploy.argv if plan.engine.of_lmdeploy else ours
        return [
            Launch(one, runner, key, hidden=hidden, ratio=self._ratio(one.group)) for one in full
        ]

    def _ratio(self, group: int) -> Callable[[], float] | None:
        """Gives each start of an engine its cache ratio; None: the plan's.

        Where other models of ours share the cards, a start takes the plan's cache whatever is free.
        """
        job, plan = self._job, self._plan
        if job.shared is not None:
            return partial(job.shared.ratio, plan, group)
        fixed = "cache_max_entry_count" in job.fixed
        return None if job.config.pretend or fixed else partial(ratio_now, plan, group)

    def _open(self, urls: list[str]) -> None:
        """All engines are ready: tell, compare, open."""
        job, plan, server = self._job, self._plan, self._server
        assert server is not None
        self.was_ready = True
        self._tell_progress(server)
        used = {} if job.config.pretend else used_now(plan)
        engines = []
        for engine in server.engines:
            rows = beside(plan.of_group(engine.group), engine, used)
            for line in lines([row for row in rows if row.gpu is not None]):
                job.say(f"{engine.name}: {line}")
            spent = engine.spent()
            engines.append(EngineRecord(group=engine.group, seconds=spent, beside=tuple(rows)))
        cached = {engine.group: engine.tracker.cached_tokens() for engine in server.engines}
        launched = as_launched(plan, cached)
        if job.config.gateway is not None:
            self._front = self._gateway(launched, urls)
            urls = [self._front.url]
        if not job.config.pretend:
            self._gpu_monitor = GpuMonitor(
                plan, self._pids, self._warn, fitted=job.shared is not None
            )
            self._gpu_monitor.start()
        job.record.attempt(engines=tuple(engines))
        job.record.state("ready", urls=tuple(urls))
        job.on_open(urls)

    def _gateway(self, plan: Plan, urls: list[str]) -> PublicSide:
        from msgspec.structs import replace

        from turbofit.gateway.http.accesslog import access_log
        from turbofit.gateway.routing.deny_file import deny_path
        from turbofit.gateway.server import make_gateway
        from turbofit.gateway.thread import GatewayThread

        job, serve_config = self._job, self._job.config
        assert serve_config.gateway is not None
        config = replace(
            serve_config.gateway,
            upstream_key=self._key,
            drain_seconds=serve_config.timing.drain,
            pretend=serve_config.pretend,
            grammars=job.lmdeploy.grammars or not plan.engine.of_lmdeploy,
            names=serve_config.names(plan),
            denied=deny_path(self._plan, job.lmdeploy.version, pretend=serve_config.pretend),
        )
        log = access_log(serve_config.access_log or str(job.folder / "access.log"))
        gateway = make_gateway(plan, urls, config, log=log, deny_list=job.deny_list)
        if job.deny_list is None:
            gateway.deny_list.file.tell(job.say)
        job.deny_list = gateway.deny_list
        assert self._server is not None
        for engine, started in zip(gateway.engines, self._server.engines, strict=True):
            engine.start_seconds = started.start_seconds
            if serve_config.check:
                engine.succeeded()  # it has just answered: /health need not wait for a question
        front: PublicSide = (job.publish or GatewayThread)(gateway)
        job.front = front
        front.start()
        return front

    def _tick(self) -> None:
        """Keep the lease true: which processes are ours, and whether they still grow.

        What a full disk did not take of it, or of the record, is written again.
        """
        server = self._server
        # An engine that is started again, or rests, takes again what it will need.
        noted = (self._pids(), self._ready, self._surplus())
        real = not self._job.config.pretend  # others need not know of pretend GPUs
        if real and (noted != self._noted or self._job.leases.unwritten):
            self._noted = noted
            pids, ready, surplus = noted
            name = self._plan.model.name
            self._job.leases.note(model=name, engines=pids, ready=ready, surplus=surplus)
        if self._job.record.unwritten:
            self._job.record.keep()
        if server is not None:
            phases = dict.fromkeys(engine.tracker.phase for engine in server.engines)
            self._enter(", ".join(phases))
            self._tell_progress(server)

    def _tell_progress(self, server: Server) -> None:
        if self._start_progress is not None:
            examined = self._job.examiner is not None
            self._start_progress.look(server.engines, examined=examined)

    @property
    def _ready(self) -> bool:
        """Whether all engines serve."""
        server = self._server
        return server is not None and all(one.state == "ready" for one in server.engines)

    def _enter(self, phase: str) -> None:
        """Note when a phase was first seen, and what the GPUs had in use then."""
        if self._moments and self._moments[-1].phase == phase:
            return
        used = {} if self._job.config.pretend else used_now(self._plan)
        at = round(time.monotonic() - self._began, 3)
        by_index = {str(index): size for index, size in used.items()}
        self._moments.append(RunMoment(phase=phase, at=at, used=by_index))
        del self._moments[:-_MOMENTS]
        self._job.record.attempt(moments=tuple(self._moments))

    def _strike(self) -> None:
        if self._front is not None:
            self._front.strike()

    def _drain(self, urgent: bool) -> None:
        if self._gpu_monitor is not None:
            self._gpu_monitor.stop()
        if self._front is not None:
            if not urgent:
                self._job.say("draining: what is under way may end")
            with under_way("draining"):
                self._front.stop(drain=not urgent)
        if self._job.shared is not None:
            # Others have come and gone since the launch: ours must go from what is there now.
            ours = self._ready and not self._job.config.pretend
            self._before = without(self._plan, used_now(self._plan)) if ours else {}

    def _gone(self, before: dict[int, int]) -> None:
        """The engines are gone: so must be their memory."""
        late = memory_back(self._plan, before) if before else []
        for text in late:
            self._job.say(f"warning: {text}")
        if before and not late:
            self._job.say("the GPUs' memory is back")
        self._job.record.attempt(memory_back=not late, restarts=self._restarts())

    def _restarts(self) -> int:
        assert self._server is not None
        return sum(max(0, engine.starts - 1) for engine in self._server.engines)

    def _pids(self) -> list[int]:
        server = self._server
        if server is None:
            return []
        return [engine.process.pid for engine in server.engines if engine.process is not None]

    def _surplus(self) -> dict[str, int] | None:
        """Bytes by GPU UUID that caches hold beyond the plan: more was free than it counted on.

        None where the engines do not tell.
        """
        if self._server is None:
            return {}
        surplus: dict[str, int] = {}
        for engine in self._server.engines:
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
        self._job.record.event("ended", f"{engine.name}: {ending.error.message}")
        if self._front is not None and self._server is not None:
            index = self._server.engines.index(engine)
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
        deny_list = self._job.deny_list
        return 0 if deny_list is None else deny_list.explained(index, seconds)

    def _rest(self, outage: Outage | None) -> None:
        """No engine runs for a while, or one is started again: clients are told."""
        if outage is not None:
            self._job.record.event("resting", outage.message)
        if self._front is not None:
            try:
                self._front.call(lambda gateway: gateway.rest(outage))
            except LaunchError as exc:  # clients are told that none is up, not for how long
                self._warn("gateway", exc.message)

    def _warn(self, kind: str, text: str) -> None:
        self._job.say(f"warning: {text}")
        self._job.record.event(kind, text)


def _remove(folder: Any) -> None:
    with suppress(OSError):
        folder.rmdir()
