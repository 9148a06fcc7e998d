"""``turbofit serve`` where engines sleep, or several models share a machine."""

from __future__ import annotations

import shutil
from collections import deque
from typing import TYPE_CHECKING, Final

from turbofit.cli.serve_launch import PRETEND, ServeLaunch
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.cli.models_options import ModelsOptions
    from turbofit.cli.serve_plan import ServeArguments
    from turbofit.core.plan import Plan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.models.model_session import ModelSession
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.job import PublicSide
    from turbofit.launch.serve.supervisor import StopSignal

__all__ = ["PlannedModel", "serve_models"]

#: Runs of a model whose folders are kept: each start is a run.
_KEPT_RUNS: Final = 20


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
        model = self.plan.model
        return self.config.model_name or model.hub_id or model.name


def serve_models(
    planned: list[PlannedModel], options: ModelsOptions, at_once: int, stop: StopSignal
) -> signal.Signals:
    """Serve them until a signal.

    Args:
        planned: in the order in which they start.
        options: when they run.
        at_once: how many run at the same time.
        stop: tells of signals.

    Raises:
        UsageError: two have the same name, or there is no gateway.
        TurbofitError: one of the first models does not start.
    """
    from msgspec.structs import replace

    from turbofit.cli.output import answer, note
    from turbofit.gateway.limits.request_limits import bounds_of
    from turbofit.gateway.models.models_gateway import ModelsGateway
    from turbofit.gateway.models.served_model import ServedModel
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.models.models_server import ModelsPolicy, ModelsServer

    config = planned[0].config
    if config.gateway is None:
        raise UsageError(
            "the gateway starts engines and chooses models, and --no-gateway leaves it out",
            hint="leave --no-gateway out",
        )
    if config.pretend:
        note(PRETEND)
    public = replace(
        config.gateway, drain_seconds=config.timing.drain, pretend=config.pretend
    )  # fmt: skip
    models = [ServedModel(one.name) for one in planned]
    bounds = [bounds_of(one.plan) for one in planned]
    front = GatewayThread(ModelsGateway(models, bounds, public, wait=options.wait_seconds))
    sessions = [_session(one, model, front) for one, model in zip(planned, models, strict=True)]
    policy = ModelsPolicy(at_once=at_once, **options.policy_fields())
    server = ModelsServer(sessions, front, policy, note)
    return server.run(stop, lambda url: answer(f"{url}\n"))


def _session(
    planned: PlannedModel, model: ServedModel, front: GatewayThread[ModelsGateway]
) -> ModelSession:
    """A model's engines, each start as `serve` would start it alone."""
    from turbofit.cli.output import note
    from turbofit.launch.models.model_session import ModelSession
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.session import run_session

    def say(text: str) -> None:
        note(f"{model.name}: {text}")

    launch = ServeLaunch(planned.arguments, planned.config, say)
    folders: deque[Path] = deque()

    def run(stop: StopSignal, publish: Callable[[Gateway], PublicSide]) -> object:
        with Leases() as leases:
            plan = launch.plan(leases)
            job = launch.job(plan, leases, lambda _: None, publish=publish)
            folders.append(job.folder)
            if len(folders) > _KEPT_RUNS:
                shutil.rmtree(folders.popleft(), ignore_errors=True)
            return run_session(job, plan, stop)

    weight_bytes = planned.plan.model.weight_bytes
    return ModelSession(model, weight_bytes, run, front)
