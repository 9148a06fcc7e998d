"""Several models on one machine: how they divide it, the runs of each, and the address of all."""

from __future__ import annotations

import shutil
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.gateway.allocator import keep_large_blocks
from turbofit.launch.models.model_run import ModelRun
from turbofit.launch.models.several_models import SeveralModels
from turbofit.launch.run import Run
from turbofit.launch.serve.leases import Leases
from turbofit.launch.serve.planner import measured, preview
from turbofit.launch.serve.shared_cards import SharedCards

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.models.several_models import ModelsPolicy
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.start import PublicSide
    from turbofit.launch.serve.supervisor import StopSignal

__all__ = ["PlannedModel", "ServedModels", "in_turns", "serve_models", "side_by_side"]

#: Runs whose folders are kept: each start of a model is a run.
_KEPT_RUNS: Final = 50


class PlannedModel(NamedTuple):
    """One model: what is asked for, and its first plan, by which it is listed and forecast."""

    config: ServeConfig
    plan: Plan

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.config.client_name(self.plan.model)


class ServedModels(NamedTuple):
    """How it ended: by which signal, the folders of the last runs, and requests that were cut."""

    ended: signal.Signals
    folders: list[Path]
    cut: int


def side_by_side(
    config: ServeConfig,
    models: Sequence[Options],
    shares: Sequence[float],
    say: Callable[[str], None],
) -> list[PlannedModel]:
    """The models as they run at the same time, each with a part of the cards.

    Args:
        config: what is asked for, of all models.
        models: what is asked of each alone, its name among it.
        shares: one a model.
        say: takes lines of progress.

    Raises:
        DoesNotFitError: they do not fit together.
    """
    from turbofit.planning.joint_plan import joint_plan, options_of_each

    assert config.request is not None
    models = options_of_each(config.request, models)
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
    return [
        PlannedModel(config.changed(request=config.request.changed(**one, budget=budget)), plan)
        for one, budget, plan in zip(models, joint.budgets, joint.plans, strict=True)
    ]


def in_turns(
    config: ServeConfig, models: Sequence[Options], say: Callable[[str], None]
) -> tuple[list[PlannedModel], int]:
    """Each model by itself, and how many run at once: as many as budgets fit beside each other.

    Args:
        config: what is asked for, of all models.
        models: what is asked of each alone, its name among it.
        say: takes lines of progress.

    Raises:
        DoesNotFitError: one of them does not fit alone.
    """
    from turbofit.planning.joint_plan import options_of_each
    from turbofit.tuner.resolved_request import budget_on

    assert config.request is not None
    made = []
    for model in options_of_each(config.request, models):
        one = config.changed(request=config.request.changed(**model))
        made.append(PlannedModel(one, preview(one)))
    budget, at_once = config.request.budget, 1
    if budget:
        every = [(gpu, one.plan.machine.gpu(gpu.index)) for one in made for gpu in one.plan.gpus]
        least = min(gpu.free // max(1, budget_on(card, budget)) for gpu, card in every)
        at_once = max(1, min(len(made), least))
    say(f"{len(made)} models take turns, {at_once} at once")
    return made, at_once


def serve_models(
    planned: Sequence[PlannedModel],
    policy: ModelsPolicy,
    stop: StopSignal,
    say: Callable[[str], None],
    on_open: Callable[[str, Sequence[str]], None],
    *,
    wait: float,
) -> ServedModels:
    """Serve them until a signal.

    Args:
        planned: in the order in which they start.
        policy: when they run.
        stop: tells of signals.
        say: takes lines of progress.
        on_open: told the address and the models' names.
        wait: seconds that a request waits for its model's start.

    Raises:
        UsageError: two have the same name.
        TurbofitError: one of the first models does not start.
    """
    keep_large_blocks()  # before the first thread, which would have a heap of its own
    models, front = _front(planned, wait)
    folders: deque[Path] = deque()
    with ExitStack() as stack:
        shared = None
        if policy.at_once > 1:
            room = stack.enter_context(TemporaryDirectory(prefix="turbofit-cards-"))
            shared = SharedCards(Path(room) / "cards" if planned[0].config.pretend else None)
        runs = [
            _model_run(one, model, front, shared, folders, say)
            for one, model in zip(planned, models, strict=True)
        ]
        several = SeveralModels(runs, front, policy, say)
        ended = several.run(stop, lambda url: on_open(url, [model.name for model in models]))
    return ServedModels(ended, list(folders), front.cut)


def _front(
    planned: Sequence[PlannedModel], wait: float
) -> tuple[list[ServedModel], GatewayThread[ModelsGateway]]:
    """The models as clients see them, and the gateway of all.

    Raises:
        UsageError: two have the same name.
    """
    from turbofit.gateway.http.model_names import unambiguous
    from turbofit.gateway.limits.request_limits import bounds_of
    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread

    config = planned[0].config
    assert config.gateway is not None
    names = [one.name for one in planned]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"two models are called {twice}: clients could not choose between them",
            hint="name each model once",
        )
    each = unambiguous([one.config.client_names(one.plan) for one in planned])
    models = [ServedModel(name, more) for name, more in zip(names, each, strict=True)]
    public = replace(config.gateway, drain_seconds=config.timing.drain, pretend=config.pretend)
    bounds = [bounds_of(one.plan) for one in planned]
    return models, GatewayThread(ModelsGateway(models, bounds, public, wait=wait))


def _model_run(
    planned: PlannedModel,
    model: ServedModel,
    front: GatewayThread[ModelsGateway],
    shared: SharedCards | None,
    folders: deque[Path],
    say: Callable[[str], None],
) -> ModelRun:
    """A model's engines, each start as `serve` would start it alone, in a folder of its own."""
    leases = Leases()
    run = Run(planned.config, leases, lambda text: say(f"{model.name}: {text}"), shared=shared)

    def launch(stop: StopSignal, publish: Callable[[Gateway], PublicSide]) -> object:
        run.publish = publish
        with leases:
            run.prepare()
            folder = run.begin()
            try:
                return run.follow(stop)
            finally:  # what still runs writes into its folder
                folders.append(folder)
                if len(folders) > _KEPT_RUNS:
                    shutil.rmtree(folders.popleft(), ignore_errors=True)

    return ModelRun(model, planned.plan.model.weight_bytes, launch, front)
