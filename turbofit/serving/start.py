"""Makes one start of a run: its engines, gateway and GPU watch.

If memory runs out, the run continues with a plan that needs less memory.
"""

from __future__ import annotations

import math
import shutil
import time
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING

from turbofit.core.errors import LaunchError, OutOfMemoryError, TurbofitError
from turbofit.core.process.files import write_atomic
from turbofit.core.process.progress import under_way
from turbofit.core.process.signals import StoppedError
from turbofit.core.run_report import EngineRecord, RunFigure, RunMoment
from turbofit.gateway.http.about import digest_of
from turbofit.gateway.http.uvicorn_server import keep_large_blocks
from turbofit.planning import checks
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.resolved_request import host_short
from turbofit.serving.calibration import in_words, is_beyond
from turbofit.serving.engine.engine_log import EndedError
from turbofit.serving.engine.gemm_tuning import give_tuning
from turbofit.serving.engine.supervised_engine import Supervision
from turbofit.serving.engine.worst_requests import LONG, ask_small, ask_worst, check_seconds
from turbofit.serving.gpu_monitor import (
    GpuMonitor,
    any_lost,
    beyond_forecast,
    memory_back,
    used_now,
)
from turbofit.serving.ladder import MOST_RUNGS, learned_file, rungs
from turbofit.serving.launch_description import LaunchDescription
from turbofit.serving.proved import Learned, Proof
from turbofit.serving.start_progress import StartProgress, compared_figures, with_real_caches
from turbofit.serving.supervisor import Supervisor

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from turbofit.core.engine_end import End
    from turbofit.core.plan import Plan
    from turbofit.core.process.signals import StopSignal
    from turbofit.core.promise import Promise
    from turbofit.gateway.http.about import ClockFacts
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.routing.engines import Outage, RoutedEngine
    from turbofit.serving.engine.supervised_engine import AskWorstCases, SupervisedEngine
    from turbofit.serving.ladder import Rung
    from turbofit.serving.run import PublicSide, Run


class Start:
    """One start of a run: its engines, gateway and GPU watch.

    ``described`` says which plan is started, and how its engines are launched.
    """

    def __init__(self, run: Run, described: LaunchDescription) -> None:
        """Launch nothing yet; `run` launches the engines."""
        self._run, self._described, self._plan = run, described, described.plan
        self._began = described.began
        #: The day on which engines here answered the worst cases, so that no check is needed.
        self._checked_on = ""
        if run.examiner is None and run.config.check == "auto":
            self._checked_on = self._proof.day
        #: Sends what each engine must answer before it is ready; None for no check.
        self._ask = self._choose_check()
        #: Bytes in use on each GPU before our engines start.
        self._before = self._used()
        self._start_progress = StartProgress(self._plan, self._before)
        self._gpu_monitor: GpuMonitor | None = None
        #: The phases of the start so far, with the bytes in use at their beginnings.
        self._moments: list[RunMoment] = []
        #: The gateway's records of the engines, by index; empty until the gateway opens.
        self._routed: dict[int, RoutedEngine] = {}
        supervision = Supervision(
            run.say, self._ask, described.timing, before_start=described.prepare,
            clients=self._routed.get, on_end=self._ended, on_rest=self._rest,
            on_back=lambda engine: self._call_gateway(lambda gw: gw.engine_ready(engine.index)),
            on_doubt=lambda index, ends_at: self._call_gateway(lambda gw: gw.doubt(index, ends_at)),
        )  # fmt: skip
        self._supervisor = Supervisor(self._plan, described.launches, run.folder, supervision)

    def run(self, stop: StopSignal) -> signal.Signals:
        """Launch the engines and serve until a signal; return the signal.

        Raises:
            EndedError: an engine ended, and another start of the engine would not help.
            TurbofitError: the start failed for another reason.
        """
        self._refuse()
        self._announce_check()
        run = self._run
        if run.examiner is not None:
            run.examiner.begin(self._plan)
        elif not run.config.pretend:
            launches, version = self._described.launches, run.lmdeploy.version
            give_tuning(launches, self._plan, version, run.say, imports=not self._proves)
        stop.on_second(self._cut_off)  # first of all, clients are told why their requests end
        try:
            return self._supervisor.run(stop, self._open, self._tick, self._drain)
        except EndedError as exc:
            self._forget_proof(exc.end)
            raise
        finally:
            self._check_memory_back()

    def _refuse(self) -> None:
        """Refuse what would stop an engine after minutes of loading, and warn of what may.

        Raises:
            TurbofitError: an engine would not start, or the gateway's port is taken.
        """
        from turbofit.machine.host import read_host

        run, config = self._run, self._run.config
        if config.gateway is not None and run.publish is None:
            from turbofit.gateway.http.uvicorn_server import bind

            bind(config.gateway).close()  # the port is bound for good once engines are ready
        ports = [launch.port for launch in self._described.launches]
        scene = Scene(
            Sources(), "start", host=read_host(), plan=self._plan, folder=run.folder, ports=ports,
            pretend=config.pretend,
        )  # fmt: skip
        for warning in checks.refuse(scene):
            run.say(f"warning: {warning}")
        if config.pretend:
            run.say(self._described.clock.words)

    def _choose_check(self) -> AskWorstCases | None:
        """Return what sends each engine its check; None for no check."""
        if self._run.examiner is not None:
            return self._run.examiner.examine
        if self._run.config.check == "none":
            return None
        if self._run.config.check == "quick" or self._checked_on:
            return ask_small
        return ask_worst

    @property
    def _proves(self) -> bool:
        """Whether this start sends the worst cases, whose answers prove the plan."""
        return self._ask is ask_worst

    def _announce_check(self) -> None:
        """Say what each engine must answer before it is ready."""
        run = self._run
        if self._checked_on:
            run.say(
                f"checked on {self._checked_on}: engines here have answered the worst cases of this"
                " plan"
            )
        if self._ask is ask_small:
            self._start_progress.doing["check"] = "answering a small request"
        if not self._proves:
            return
        seconds = check_seconds(self._plan)
        self._start_progress.check_seconds = seconds
        if not run.config.pretend:
            choice = "; --check quick sends one small request instead" if seconds > LONG else ""
            run.say(f"the worst-case requests will take about {seconds:.0f} s{choice}")

    @cached_property
    def _proof(self) -> Proof:
        return Proof(self._plan, self._run.config, self._run.lmdeploy.version)

    def _forget_proof(self, end: End) -> None:
        """Forget the proof of a plan whose engine ran out of memory: the next start checks anew."""
        if end.is_oom:
            self._proof.forget()

    def _open(self, urls: list[str]) -> None:
        """Compare the ready engines with the plan, open the gateway, and report both."""
        run, plan, supervisor = self._run, self._plan, self._supervisor
        self._tell_progress()  # the display of the start ends here; `on_open` may begin another
        used = self._used()
        engines = []
        for engine in supervisor.engines:
            rows = engine.tracker.figures
            if self._proves or run.examiner is not None:  # only worst cases show an engine's peak
                rows = compared_figures(plan, engine, used)
            self._tell_figures(engine.name, rows)
            if engine.launch.tuning is not None:
                engine.launch.tuning.keep()
            seconds = engine.spent()
            engines.append(EngineRecord(group=engine.group, seconds=seconds, beside=tuple(rows)))
        cached = {engine.group: engine.tracker.cached_tokens() for engine in supervisor.engines}
        launched = with_real_caches(plan, cached)
        if run.config.gateway is not None:
            urls = [self._gateway(launched, urls).url]
        if not run.config.pretend:
            self._gpu_monitor = GpuMonitor(plan, self._pids, self._warn)
            self._gpu_monitor.start()
        if self._proves:
            # Torch keeps freed memory until an allocation fails: its use is more than its need.
            measurable = not run.config.pretend and not plan.backend.on_torch
            self._proof.keep(beyond_forecast(plan, self._pids()) if measurable else None)
        run.record.attempt(engines=tuple(engines))
        run.record.change(state="ready", urls=tuple(urls))
        run.on_open(urls)
        if run.starts_trials and run.public is not None:
            self._start_trials(launched)

    def _tell_figures(self, name: str, rows: Sequence[RunFigure]) -> None:
        """Say what a ready engine holds of each GPU; more than its forecast is a warning."""
        for row in rows:
            text = f"{name}: {in_words(row)}"
            if is_beyond(row):
                remedy = "" if self._run.config.pretend else "; turbofit calibrate corrects plans"
                self._warn("beyond_forecast", f"{text}{remedy}")
            elif row.gpu is not None:
                self._run.say(text)

    def _start_trials(self, plan: Plan) -> None:
        """Start the process that tries grammars, which takes seconds, before it is needed."""
        if not host_short(plan.host):
            self._call_gateway(lambda gateway: gateway.start_trials())
        elif plan.backend.of_lmdeploy:
            self._run.say(
                "note: the first answer with a grammar (response_format, forced tools) takes 5 to"
                " 15 s more, since host memory is short for the process that tries grammars"
            )

    def _gateway(self, plan: Plan, urls: list[str]) -> PublicSide:
        """Make and open the engines' gateway; return the public side."""
        from turbofit.gateway.grammar_trials import trials_of
        from turbofit.gateway.server import GatewayThread
        from turbofit.serving.access_log import access_log
        from turbofit.serving.plan_gateway import make_gateway

        run, serve_config = self._run, self._run.config
        assert serve_config.gateway is not None
        own, described = serve_config.gateway, self._described
        slower = max(1.0, described.clock.factor)
        # With `liveness`, the supervisor ends a hanging engine, so the gateway need not judge it.
        hung = math.inf if serve_config.timing.liveness else slower * own.hung_seconds
        config = own.changed(
            upstream_key=described.key,
            hung_seconds=hung,
            queue_seconds=slower * own.queue_seconds,
            drain_seconds=described.timing.drain,
            pretend=serve_config.pretend,
            names=serve_config.names(plan),
        )
        log = access_log(serve_config.access_log or str(run.folder / "access.log"))
        overlay, options = str(described.overlay), described.options
        gateway = make_gateway(
            plan, urls, config, log=log, deny_list=run.deny_list,
            grammars=trials_of(plan, overlay, options, run.say, ours=True),
            in_use=partial(self._start_progress.used, self._supervisor.engines),
            clock=self._clock_facts,
        )  # fmt: skip
        run.deny_list = gateway.deny_list
        supervised = zip(gateway.engines, self._supervisor.engines, strict=True)
        for index, (engine, started) in enumerate(supervised):
            self._routed[index] = engine
            engine.start_seconds = started.start_seconds
            if serve_config.check != "none":
                engine.succeeded()  # the engine has just answered a check
        run.public = (run.publish or GatewayThread)(gateway)
        run.public.start()
        return run.public

    def _clock_facts(self) -> ClockFacts | None:
        """Return facts on the clocks of pretend GPUs; None without a clock."""
        from turbofit.gateway.http.about import ClockFacts

        clocks = [engine.clock for engine in self._supervisor.engines if engine.clock is not None]
        if not clocks:
            return None
        readings = [clock.read() for clock in clocks]
        most = max(readings, key=lambda reading: reading.late + reading.idle)
        clock = self._described.clock
        return ClockFacts(
            factor=clock.factor, words=clock.words, late=most.late, idle=most.idle,
            busy=sum(reading.busy for reading in readings),
        )  # fmt: skip

    def _tick(self) -> None:
        """Update the lease, and note each new phase with the bytes that the GPUs have in use."""
        run, engines = self._run, self._supervisor.engines
        if not run.config.pretend:  # pretend GPUs take no memory from other processes
            run.leases.note(
                # Not ready if an engine restarts or rests, since the engine will take memory again.
                self._pids(), ready=self._supervisor.ready,
                larger=any(engine.tracker.cache_is_larger for engine in engines),
            )  # fmt: skip
        phase = ", ".join(dict.fromkeys(engine.tracker.phase for engine in engines))
        if not self._moments or self._moments[-1].phase != phase:
            seconds = round(time.monotonic() - self._began, 3)
            by_index = {str(index): size for index, size in self._used().items()}
            self._moments.append(RunMoment(phase=phase, at=seconds, used=by_index))
            run.record.attempt(moments=tuple(self._moments))
        self._tell_progress()
        # A standby of an engine that still imports would take processor time from the engine.
        if run.standby is not None and not self._supervisor.importing:
            run.standby.look(self._plan.host.total if self._supervisor.starting else 0)
        run.on_tick()

    def _tell_progress(self) -> None:
        self._start_progress.look(self._supervisor.engines, examined=self._run.examiner is not None)

    def _used(self) -> dict[int, int]:
        """Return bytes in use on each GPU; empty on pretend GPUs, which no other process uses."""
        return {} if self._run.config.pretend else used_now(self._plan)

    def _cut_off(self) -> None:
        if self._run.public is not None:
            self._run.public.cut_off()

    def _drain(self, urgent: bool) -> None:
        """Stop the GPU monitor and close the gateway; wait for running requests unless urgent."""
        if self._gpu_monitor is not None:
            self._gpu_monitor.stop()
        if self._run.public is not None:
            if not urgent:
                self._run.say("draining: running requests may end")
            with under_way("draining"):
                self._run.public.stop(drain=not urgent)

    def _check_memory_back(self) -> None:
        """Check that the memory of the ended engines is free again."""
        # On shared cards, engines of other servers come and go, so a comparison says nothing.
        before = {} if self._plan.shares_cards else self._before
        late = memory_back(self._plan, before) if before else []
        for text in late:
            self._run.say(f"warning: {text}")
        if before and not late:
            self._run.say("the GPUs' memory is back")
        restarts = sum(max(0, engine.starts - 1) for engine in self._supervisor.engines)
        self._run.record.attempt(memory_back=not late if before else None, restarts=restarts)

    def _pids(self) -> list[int]:
        return [
            engine.process.pid for engine in self._supervisor.engines if engine.process is not None
        ]

    def _ended(self, engine: SupervisedEngine, end: End) -> None:
        """Record an engine's end, and tell the gateway."""
        self._forget_proof(end)
        died = f"{engine.name}: {end.error.message}"
        self._run.record.event("ended", died)
        self._run.on_death(died)
        if self._run.public is not None:
            other = self._other_cause(engine, end)
            self._call_gateway(lambda gw: gw.engine_ended(engine.index, other_cause=other))

    def _call_gateway(self, act: Callable[[Gateway], None]) -> None:
        """Call ``act`` in the gateway's event loop; skip the call if no gateway answers in time."""
        if self._run.public is not None:
            with suppress(LaunchError):
                self._run.public.call(act)

    def _other_cause(self, engine: SupervisedEngine, end: End) -> bool:
        """Return whether an engine ended for a reason that no request can cause."""
        monitor = self._gpu_monitor
        uuids = [gpu.uuid for gpu in engine.planned.ledgers]
        if end.kind == "out_of_memory" and monitor is not None and monitor.without_headroom(uuids):
            return True
        return end.kind == "killed" or any_lost(uuids)

    def _rest(self, outage: Outage | None) -> None:
        """Tell clients that all engines rest, or that an engine is started again."""
        if outage is not None:
            self._run.record.event("resting", outage.message)
        self._call_gateway(lambda gateway: gateway.rest(outage))

    def _warn(self, kind: str, text: str) -> None:
        self._run.say(f"warning: {text}")
        self._run.record.event(kind, text)


def follow(run: Run, stop: StopSignal) -> signal.Signals:
    """Start a run's engines and serve until a signal; return the signal. Call `Run.begin` first.

    Raises:
        TurbofitError: the run ended without a signal; the record contains the reason.
    """
    assert run.plan is not None
    keep_large_blocks()  # before the first thread: only later threads share one heap
    try:
        ended = _follow(run, run.plan, stop)
    except StoppedError as exc:
        run.record.change(state="ended", ended=exc.signal.name)
        raise
    finally:
        # A twin and an overlay can be made again; a timeline is large.
        for name in ("model", "overlay-*", "pretend-*"):
            for folder in run.folder.glob(name):
                shutil.rmtree(folder, ignore_errors=True)
    run.record.change(state="ended", ended=ended.name)
    return ended


def _follow(run: Run, plan: Plan, stop: StopSignal) -> signal.Signals:
    """Start the run's plan, then plans that need less memory if it runs out; return the signal."""
    failed, why = 0, ""
    while True:
        run.public = None
        run.record.begin(
            number=failed, changes=run.changes, why=why, requests_at_once=plan.requests_at_once,
            settings=tuple(engine.settings for engine in plan.engines),
        )  # fmt: skip
        try:
            with ExitStack() as holders:
                described = LaunchDescription(run, plan, failed, holders)
                return Start(run, described).run(stop)
        except EndedError as exc:
            end = exc.end
        except TurbofitError as exc:
            run.record.change(state="failed", ended=exc.to_dict()["error"])
            raise
        run.record.attempt(ended=end.record())
        failed += 1
        step = _step_down(run, plan, end, failed)
        if step is None:
            run.record.change(state="failed", ended=end.record())
            if failed == 1 or not end.is_oom:
                raise end.error
            raise OutOfMemoryError(
                f"out of memory after {failed} starts, the last: {end.error.message}",
                hint=f"{run.folder} has the log of each start; turbofit diagnose explains a log",
            )
        plan, rung = step
        run.changes, why = {**run.changes, **rung.changes}, rung.why
        place = f"warning: ladder {failed}/{MOST_RUNGS}"
        run.say(f"{place}: {end.error.message}")
        run.say(f"{place}: {why}")
        version, pretend = run.lmdeploy.version, run.config.pretend
        learned_file(plan, version, pretend=pretend).write(Learned(changes=run.changes))
        with suppress(TurbofitError):  # a full disk loses the file, not the server
            path = run.folder / f"plan-{failed}.json"
            write_atomic(path, plan.to_json(), mode=0o600)


def _step_down(run: Run, plan: Plan, end: End, failed: int) -> tuple[Plan, Rung] | None:
    """Return the next plan after a lack of memory, and the rung that led to this plan.

    The first plan that fits and differs from the last plan is returned. Plans that keep the promise
    are tried first. If no settings keep it, a plan makes a smaller promise, and the run says so.
    None if the plan was given, if the engine did not run out of memory, or if no rung helps.
    """
    if run.config.plan is not None or not end.is_oom or failed > MOST_RUNGS:
        return None
    run.plan = None  # the last plan must not serve again
    steps = list(rungs(end, plan, run.fixed))
    kept = [rung for rung in steps if not rung.promises_less]
    step = _first_step(run, plan, kept, plan.promise)
    if step is None and steps:
        run.say("ladder: no settings keep the promise of the last plan: a smaller one is made")
        step = _first_step(run, plan, steps, None)
    return step


def _first_step(
    run: Run, plan: Plan, steps: Sequence[Rung], promise: Promise | None
) -> tuple[Plan, Rung] | None:
    """Return the first rung whose plan fits and differs from ``plan``, with this plan."""
    for rung in steps:
        try:
            planned = run.planner.make({**run.changes, **rung.changes}, promise)
        except TurbofitError as exc:
            run.say(f"ladder: {rung.why}: {exc.message}")
            continue
        if not planned.fits:
            run.say(f"ladder: {rung.why}: {planned.verdict}")
        elif digest_of(planned) != digest_of(plan):
            return planned, rung
    return None
