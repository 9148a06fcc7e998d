"""Several models on one machine: its division, each model's runs, and their one address."""

from __future__ import annotations

import shutil
import signal
import time
from collections import deque
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from operator import itemgetter
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import DoesNotFitError, LaunchError, TurbofitError, UsageError
from turbofit.core.struct import Struct
from turbofit.core.units import format_duration
from turbofit.gateway.models import AttachedGateway, ModelsGateway, ServedModel, insist
from turbofit.gateway.routing.health import healthy
from turbofit.gateway.server import keep_large_blocks
from turbofit.launch.engine.standby import standby_of
from turbofit.launch.follow import follow
from turbofit.launch.run import Run
from turbofit.launch.serve.leases import Leases
from turbofit.launch.serve.planner import measured, preview
from turbofit.launch.serve.supervisor import StopSignal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.gateway.server import GatewayThread
    from turbofit.launch.engine.standby import StandbyStarter
    from turbofit.launch.serve.config import ServeConfig

#: How many run folders of a model are kept; each of its starts makes one.
_KEPT_RUNS: Final = 50


class PlannedModel(NamedTuple):
    """One model: its configuration, and its first plan, from which its name comes."""

    config: ServeConfig
    plan: Plan

    @property
    def name(self) -> str:
        return self.config.client_name(self.plan.model)


class ServedModels(NamedTuple):
    """The end of serving: the signal, the last runs' folders, the number of requests cut off."""

    ended: signal.Signals
    folders: list[Path]
    cut: int


def side_by_side(
    config: ServeConfig, models: Sequence[Options], say: Callable[[str], None]
) -> list[PlannedModel]:
    """Plan models that run at the same time, each with a part of the cards.

    ``config`` holds the options of all models, ``models`` those of each alone, its name among them.

    Raises:
        DoesNotFitError: they do not fit together.
    """
    from turbofit.planning.joint_plan import joint_plan, options_of_each
    from turbofit.rehearse.confirm import refuse_untwinned

    assert config.request is not None
    models = options_of_each(config.request, models)
    requests = [config.request.changed(**options) for options in models]
    if not config.pretend:
        with Leases() as leases:
            here = measured(leases, config.request.gpus, say)
        requests = [request.changed(on=here, gpus=None) for request in requests]
    for request in requests if config.pretend else ():
        refuse_untwinned(request)
    joint = joint_plan(requests, pretend=config.pretend)
    if not joint.fits:
        raise DoesNotFitError(
            joint.verdict, hint=joint.remedy or "see turbofit plan MODEL for what would fit"
        )
    say(joint.verdict)
    planned = []
    for options, budget, plan in zip(models, joint.budgets, joint.plans, strict=True):
        # Each model plans again in its part, and must not count the cores of the others.
        threads = plan.host.image_threads
        request = config.request.changed(**options, budget=budget, image_threads=threads)
        planned.append(PlannedModel(config.changed(request=request), plan))
    return planned


def in_turns(
    config: ServeConfig, models: Sequence[Options], say: Callable[[str], None]
) -> tuple[list[PlannedModel], int]:
    """Plan each model alone; returns them, and how many run at once because budgets fit.

    Raises:
        DoesNotFitError: one of them does not fit alone.
    """
    from turbofit.planning.joint_plan import options_of_each
    from turbofit.rehearse.confirm import refuse_untwinned
    from turbofit.tuner.resolved_request import budget_on

    assert config.request is not None
    planned = []
    for model in options_of_each(config.request, models):
        model_config = config.changed(request=config.request.changed(**model))
        if config.pretend:
            refuse_untwinned(config.request.changed(**model))
        planned.append(PlannedModel(model_config, preview(model_config)))
    budget, at_once = config.request.budget, 1
    if budget:
        plans = [planned_model.plan for planned_model in planned]
        every = [(gpu, plan.machine.gpu(gpu.index)) for plan in plans for gpu in plan.gpus]
        least = min(gpu.free // max(1, budget_on(card, budget)) for gpu, card in every)
        at_once = max(1, min(len(planned), least))
    say(f"{len(planned)} models take turns, {at_once} at once")
    return planned, at_once


def serve_models(
    planned: Sequence[PlannedModel],
    policy: ModelsPolicy,
    stop: StopSignal,
    say: Callable[[str], None],
    on_open: Callable[[str, Sequence[str]], None],
    *,
    wait: float,
) -> ServedModels:
    """Serve the models until a signal; the first ``at_once`` of them start immediately.

    ``on_open`` receives the address and the models' names. ``wait``: seconds that a request waits
    for the start of its model.

    Raises:
        UsageError: two models have the same name.
        TurbofitError: one of the first models does not start.
    """
    keep_large_blocks()  # before the first thread, which would have a heap of its own
    models, front = _front(planned, wait)
    shared = policy.at_once > 1
    with standby_of(planned[0].config, say) as standby:
        runs = [
            ModelRun(one.config, model, front, say, shared=shared, standby=standby)
            for one, model in zip(planned, models, strict=True)
        ]
        several = SeveralModels(runs, front, policy, say, standby)
        ended = several.run(stop, lambda url: on_open(url, [model.name for model in models]))
    return ServedModels(ended, sorted(folder for run in runs for folder in run.folders), front.cut)


def _front(
    planned: Sequence[PlannedModel], wait: float
) -> tuple[list[ServedModel], GatewayThread[ModelsGateway]]:
    """The models as clients see them, whose names must differ, and the gateway of them all."""
    from turbofit.gateway.http.routes import unambiguous
    from turbofit.gateway.limits.request_limits import bounds_of
    from turbofit.gateway.server import GatewayThread

    config = planned[0].config
    assert config.gateway is not None
    names = [planned_model.name for planned_model in planned]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"two models are called {twice}: clients could not choose between them",
            hint="name each model once",
        )
    client_names = [model.config.client_names(model.plan) for model in planned]
    models = [
        ServedModel(name, more) for name, more in zip(names, unambiguous(client_names), strict=True)
    ]
    public = replace(config.gateway, drain_seconds=config.timing.drain, pretend=config.pretend)
    bounds = [bounds_of(planned_model.plan) for planned_model in planned]
    return models, GatewayThread(ModelsGateway(models, bounds, public, wait=wait))


class ModelRun:
    """A model's engines, from one start to the next; each start is a run in a thread of its own."""

    def __init__(
        self,
        config: ServeConfig,
        model: ServedModel,
        front: GatewayThread[ModelsGateway],
        say: Callable[[str], None],
        *,
        shared: bool,
        standby: StandbyStarter | None = None,
    ) -> None:
        self.model, self._leases, self._stop = model, Leases(), StopSignal()
        self._run = Run(
            config, self._leases, lambda text: say(f"{model.name}: {text}"),
            publish=partial(AttachedGateway, front, model), shared=shared, standby=standby,
        )  # fmt: skip
        self.folders: deque[Path] = deque()
        #: Done when the current start has ended; None if no engine holds memory or may take it.
        self.under_way: Future[None] | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that its engines take, by its last plan."""
        plan = self._run.plan
        return 0 if plan is None else plan.host.total

    @property
    def ending(self) -> bool:
        """Whether the model's engines were told to end."""
        return self.under_way is not None and self._stop.signal is not None

    def start(self) -> None:
        """Start the model's engines; `ended` tells when they have ended."""
        self._stop, self.under_way = StopSignal(), Future()
        body = partial(self._follow, self._stop, self.under_way)
        Thread(target=body, name=f"model {self.model.name}", daemon=True).start()

    def _follow(self, stop: StopSignal, ended: Future[None]) -> None:
        try:
            self.serve(stop)
            ended.set_result(None)
        except BaseException as exc:  # noqa: BLE001 - it is raised again, or told to clients
            ended.set_exception(exc)

    def serve(self, stop: StopSignal) -> None:
        """Run the model once: plan with the free memory, launch, and follow until the signal."""
        with self._leases:
            self._run.prepare()
            if len(self.folders) == _KEPT_RUNS:
                shutil.rmtree(self.folders.popleft(), ignore_errors=True)
            self.folders.append(self._run.begin())
            follow(self._run, stop)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._stop.end(number)

    def strike(self) -> None:
        """End the model's engines immediately; takes no lock."""
        if self.under_way is not None:
            self._stop.strike()

    def ended(self) -> bool:
        """Whether the start has ended normally; raises the error that ended it otherwise."""
        if self.under_way is None or not self.under_way.done():
            return False
        error, self.under_way = self.under_way.exception(), None
        if error is not None:
            raise error
        return True


#: Seconds without a request after which a model yields its cards before its turn is over.
LULL_SECONDS: Final = 2.0

#: Seconds beyond their deadlines for which the engines' end is awaited.
_LAST_SECONDS: Final = 120.0


class ModelsPolicy(Struct):
    """Says when models' engines run; times are in seconds.

    ``idle``: engines end after this time without a request, with None never. ``at_once`` models run
    at the same time, the others wait. ``turn``: while requests keep coming, a model serves this
    long before it ends for another. ``again``: a model that failed to start is not tried for this
    long.
    """

    idle: float | None = None
    at_once: int = 1
    turn: float = 30.0
    again: float = 60.0
    tick: float = 0.1


@dataclass
class SeveralModels:
    """All models behind one address, which is started and stopped here.

    As many of ``runs`` start immediately, in their order, as may run at the same time.
    """

    runs: Sequence[ModelRun]
    front: GatewayThread[ModelsGateway]
    policy: ModelsPolicy
    say: Callable[[str], None]
    standby: StandbyStarter | None = None

    def run(self, stop: StopSignal, on_open: Callable[[str], None]) -> signal.Signals:
        """Serve until a signal, which is returned. Call it in the main thread.

        ``on_open`` is told the address when the first models are ready.

        Raises:
            TurbofitError: the address cannot be bound, or one of the first models does not start.
        """
        self.front.start()
        first = [run.model.name for run in self.runs[: self.policy.at_once]]
        self.say(
            f"{self.front.url} is open: a request waits until its model is ready; "
            f"{', then '.join(first)} {'starts' if len(first) == 1 else 'start'} now"
        )
        stop.on_second(self.front.cut_off)
        for run in self.runs:
            stop.on_second(run.strike)
        stop.abrupt = False
        try:
            for run in self.runs[: self.policy.at_once]:
                if stop.signal is None:
                    self._start(run)
                while stop.signal is None and run.model.state != "ready":
                    run.ended()
                    time.sleep(self.policy.tick)
            if stop.signal is None:
                insist(self.front, lambda front: setattr(front, "opened", True))
                on_open(self.front.url)
            while stop.signal is None:
                for run in self.runs:
                    self._collect(run)
                for run in self.runs:
                    self._rest_idle(run)
                self._start_next()
                self._stand_by()
                time.sleep(self.policy.tick)
        finally:
            self._end(stop)
            stop.abrupt = stop.signal is None
        return stop.signal

    def _stand_by(self) -> None:
        """Keep a standby process while no model starts: it would take processors from the start."""
        if self.standby is not None and not self._starting:
            asleep = [run for run in self.runs if run.under_way is None]
            self.standby.look(max((run.host_bytes for run in asleep), default=0))

    def _collect(self, run: ModelRun) -> None:
        """Note that a run has ended; clients are told if it failed."""
        model = run.model
        try:
            if run.ended():
                insist(self.front, lambda _: model.sleep())
        except TurbofitError as exc:
            message, pause = exc.message, format_duration(self.policy.again)
            self.say(f"warning: {model.name}: {message}; it is left alone for {pause}")
            until = time.monotonic() + self.policy.again
            insist(self.front, lambda _: model.fail(message, until))

    def _rest_idle(self, run: ModelRun) -> None:
        model, seconds = run.model, inf if self.policy.idle is None else self.policy.idle
        if run.ending or run.under_way is None:
            return
        # Not while another model starts: its cache would take a part of the returned memory.
        idle = model.state == "ready" and model.idle >= seconds
        if idle and not self._starting and insist(self.front, lambda _: model.close_idle(seconds)):
            self.say(
                f"{model.name}: nobody asked for {format_duration(model.idle)}, its engines "
                "end and give their memory back"
            )
        if model.state == "ending" and not model.in_flight:
            run.end()

    @property
    def _starting(self) -> bool:
        """Whether engines of a model start, or start again after a death."""
        return any(
            model.state == "starting"
            or (
                model.state == "ready"
                and (gateway := model.gateway) is not None
                and gateway.fleet.outage is None  # a model that rests keeps no request waiting
                and not healthy(gateway.fleet)
            )
            for model in (run.model for run in self.runs)
        )

    def _start_next(self) -> None:
        """Start the model whose request has waited longest, or make room for it."""
        if self._starting or any(run.model.state == "ending" for run in self.runs):
            return
        following = self._longest_waiting()
        if following is None:
            return
        running = [run.model for run in self.runs if run.under_way is not None]
        if len(running) < self.policy.at_once:
            self._start(following)
            return
        victim = gives_way(running, self.policy.turn, time.monotonic())
        if victim is not None:
            insist(self.front, lambda _: victim.close())
            self.say(f"{victim.name} makes way for {following.model.name}")

    def _longest_waiting(self) -> ModelRun | None:
        """The stopped model that was wanted first; None if none is wanted."""
        # Models that always run start again after a failure, without a request for them.
        always = self.policy.idle is None and self.policy.at_once >= len(self.runs)
        waiting = []
        for run in self.runs:
            model = run.model
            since = model.again_at if always and model.state == "failed" else model.wanted_since
            if run.under_way is None and model.rested and since is not None:
                waiting.append((since, run))
        return min(waiting, key=itemgetter(0))[1] if waiting else None

    def _start(self, run: ModelRun) -> None:
        insist(self.front, lambda _: run.model.begin())
        run.start()

    def _end(self, stop: StopSignal) -> None:
        """Let running requests finish, then end the engines; waiting requests are refused."""
        with suppress(LaunchError):
            self.front.call(lambda front: front.end())
        self.front.stop(drain=not stop.urgent and stop.signal is not None)
        for run in self.runs:
            run.end(stop.signal or signal.SIGTERM)
        wait([run.under_way for run in self.runs if run.under_way is not None], _LAST_SECONDS)


def gives_way(models: Iterable[ServedModel], turn: float, now: float) -> ServedModel | None:
    """The least recently used model whose turn is over; None if there is none.

    A turn is over after ``turn`` seconds of being ready, or after `LULL_SECONDS` without a request.
    """
    over = [
        model
        for model in models
        if model.state == "ready" and (now - model.ready_at >= turn or model.idle >= LULL_SECONDS)
    ]
    return min(over, key=lambda model: now if model.in_flight else model.used_at, default=None)
