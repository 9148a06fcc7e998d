"""``turbofit serve`` where engines sleep, or several models share a machine."""

from __future__ import annotations

import json
import shutil
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from turbofit.cli.serving.serve_launch import PRETEND, ServeLaunch
from turbofit.core.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from turbofit.cli.options.models_options import ModelsOptions
    from turbofit.cli.serving.serve_plan import ServeArguments
    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.models.model_session import ModelSession
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.job import PublicSide
    from turbofit.launch.serve.shared_cards import SharedCards
    from turbofit.launch.serve.supervisor import StopSignal

__all__ = ["PlannedModel", "planned_models", "serve_models"]

#: Runs whose folders are kept: each start is a run.
_KEPT_RUNS: Final = 50


class PlannedModel:
    """One model of the command line, and its first plan.

    Args:
        arguments: the command line, with this model.
        config: what it asks for.
        plan: what it is listed and forecast by; each start plans for what is free then.
    """

    def __init__(self, arguments: ServeArguments, config: ServeConfig, plan: Plan) -> None:
        self.arguments, self.config, self.plan = arguments, config, plan

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.config.client_name(self.plan.model)


def planned_models(
    arguments: ServeArguments,
    config: ServeConfig,
    models: Sequence[Options],
    shares: Sequence[float],
    options: ModelsOptions,
) -> tuple[list[PlannedModel], int]:
    """The models as they are to run, and how many run at once.

    Args:
        arguments: the command line.
        config: what it asks for, of all models.
        models: what is asked of each alone, its name among it.
        shares: one a model.
        options: when they run.

    Raises:
        DoesNotFitError: they do not fit together, or one of them does not fit alone.
    """
    from turbofit.cli.terminal.output import say
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.planner import measured
    from turbofit.planning.joint_plan import joint_plan, options_of_each

    assert config.request is not None
    models = options_of_each(config.request, models)
    if options.swap:
        return _in_turns(arguments, config, models)

    requests = [config.request.changed(**one) for one in models]
    if not config.pretend:
        with Leases() as leases:
            here = measured(leases, config.request.gpus, say)
        requests = [request.changed(on=here, gpus=None) for request in requests]
    joint = joint_plan(requests, shares, pretend=config.pretend)
    if not joint.fits:
        raise DoesNotFitError(
            joint.verdict, hint=joint.remedy or "see turbofit plan MODEL for what would fit"
        )
    say(joint.verdict)
    made = [
        PlannedModel(
            arguments._replace(request=arguments.request.changed(**one)),
            config.changed(request=config.request.changed(**one, budget=budget)),
            plan,
        )
        for one, budget, plan in zip(models, joint.budgets, joint.plans, strict=True)
    ]
    return made, len(made)


def _in_turns(
    arguments: ServeArguments, config: ServeConfig, models: Sequence[Options]
) -> tuple[list[PlannedModel], int]:
    """Each model by itself; as many run at once as budgets fit beside each other."""
    from turbofit.cli.serving.serve_plan import preview
    from turbofit.cli.terminal.output import say
    from turbofit.tuner.resolved_request import budget_on

    assert config.request is not None
    made = []
    for model in models:
        one = config.changed(request=config.request.changed(**model))
        named = arguments._replace(request=arguments.request.changed(**model))
        made.append(PlannedModel(named, one, preview(named, one)))
    budget, at_once = config.request.budget, 1
    if budget:
        every = [(gpu, one.plan.machine.gpu(gpu.index)) for one in made for gpu in one.plan.gpus]
        side_by_side = min(gpu.free // max(1, budget_on(card, budget)) for gpu, card in every)
        at_once = max(1, min(len(made), side_by_side))
    say(f"{len(made)} models take turns, {at_once} at once")
    return made, at_once


def serve_models(
    planned: Sequence[PlannedModel],
    options: ModelsOptions,
    at_once: int,
    stop: StopSignal,
    *,
    as_json: bool = False,
) -> signal.Signals:
    """Serve them until a signal.

    Args:
        planned: in the order in which they start.
        options: when they run.
        at_once: how many run at the same time.
        stop: tells of signals.
        as_json: whether stdout gets one document at the end, and not the address.

    Raises:
        UsageError: two have the same name.
        TurbofitError: one of the first models does not start.
    """
    from turbofit.cli.terminal.output import answer, note, say
    from turbofit.gateway.allocator import keep_large_blocks
    from turbofit.launch.models.models_server import ModelsPolicy, ModelsServer
    from turbofit.launch.serve.shared_cards import SharedCards

    keep_large_blocks()  # before the first thread, which would have a heap of its own
    pretend = planned[0].config.pretend
    models, front = _front(planned, wait=options.wait_seconds)
    if pretend:
        note(PRETEND)
    folders: deque[Path] = deque()
    with ExitStack() as stack:
        shared = None
        if at_once > 1:
            room = stack.enter_context(TemporaryDirectory(prefix="turbofit-cards-"))
            shared = SharedCards(Path(room) / "cards" if pretend else None)
        sessions = [
            _session(one, model, front, shared, folders)
            for one, model in zip(planned, models, strict=True)
        ]  # fmt: skip
        policy = ModelsPolicy(at_once=at_once, **options.policy_fields())
        server = ModelsServer(sessions, front, policy, say)
        ended = server.run(stop, lambda url: None if as_json else answer(f"{url}\n"))
    if as_json:
        runs = [str(folder) for folder in folders]
        answer(json.dumps({"ended": ended.name, "runs": runs}, indent=2) + "\n")
    return ended


def _front(
    planned: Sequence[PlannedModel], *, wait: float
) -> tuple[list[ServedModel], GatewayThread[ModelsGateway]]:
    """The models as clients see them, and the gateway of all.

    Raises:
        UsageError: two have the same name.
    """
    from msgspec.structs import replace

    from turbofit.gateway.limits.request_limits import bounds_of
    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread

    config = planned[0].config
    assert config.gateway is not None
    models = [ServedModel(one.name) for one in planned]
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"two models are called {twice}: clients could not choose between them",
            hint="name each model once",
        )
    public = replace(config.gateway, drain_seconds=config.timing.drain, pretend=config.pretend)
    bounds = [bounds_of(one.plan) for one in planned]
    return models, GatewayThread(ModelsGateway(models, bounds, public, wait=wait))


def _session(
    planned: PlannedModel,
    model: ServedModel,
    front: GatewayThread[ModelsGateway],
    shared: SharedCards | None,
    folders: deque[Path],
) -> ModelSession:
    """A model's engines, each start as `serve` would start it alone, in a folder of its own."""
    from turbofit.cli.terminal.output import say
    from turbofit.launch.models.model_session import ModelSession
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.session import run_session

    def tell(text: str) -> None:
        say(f"{model.name}: {text}")

    launch = ServeLaunch(planned.arguments, planned.config, tell, shared)

    def run(stop: StopSignal, publish: Callable[[Gateway], PublicSide]) -> object:
        with Leases() as leases:
            plan = launch.plan(leases)
            job = launch.job(plan, leases, lambda _: None, publish=publish)
            try:
                return run_session(job, plan, stop)
            finally:  # what still runs writes into its folder
                folders.append(job.folder)
                if len(folders) > _KEPT_RUNS:
                    shutil.rmtree(folders.popleft(), ignore_errors=True)

    weight_bytes = planned.plan.model.weight_bytes
    return ModelSession(model, weight_bytes, run, front)
