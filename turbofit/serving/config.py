"""The settings of one `serve`: a plan's request, the gateway, deadlines, what is checked."""

from __future__ import annotations

from pydantic import Field

from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.core.process.ports import DEFAULT_PORT, LAST_PORT
from turbofit.core.validation import Validated
from turbofit.gateway.config import GatewayConfig
from turbofit.model.presets import find_preset
from turbofit.planning.request import PlanRequest
from turbofit.serving.engine.check import CheckMode
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.passthrough import adapter_names


class ServeConfig(Validated):
    """One `turbofit serve` on one machine.

    >>> ServeConfig(request=PlanRequest(model="internvl2-8b"), gateway=GatewayConfig(port=8000))
    """

    request: PlanRequest | None = Field(
        default=None,
        description="what to plan for; None where a plan is given",
    )
    plan: Plan | None = Field(default=None, description="what is launched, and may not change")
    gateway: GatewayConfig | None = Field(
        default=None, description="the public side; None for engines that clients reach themselves"
    )
    port: int = Field(
        default=DEFAULT_PORT,
        ge=0,
        le=LAST_PORT,
        description="without a gateway, the first engine's",
    )
    timing: Timing = Field(default=Timing(), description="deadlines and pauses")
    options: tuple[str, ...] = Field(default=(), description="LMDeploy's own options, passed on")
    unplanned: tuple[str, ...] = Field(default=(), description="those the plan does not count")
    api_key: str | None = Field(default=None, description="without a gateway, the engines' key")
    model_name: str | None = Field(default=None, description="what the engines call the model")
    access_log: str | None = Field(
        default=None, description="a file, - for stderr, or none; None is the run's folder"
    )
    check: CheckMode = Field(
        default="auto", description="what must be answered before it opens; see `CheckMode`"
    )
    rehearse: bool = Field(default=True, description="a plan is rehearsed before it is launched")
    standby: bool = Field(
        default=True, description="a process has imported what the next start needs"
    )
    pretend: bool = Field(default=False, description="on pretend GPUs")

    def client_name(self, model: Model) -> str:
        """The name by which its engines call a model."""
        return self.model_name or model.hub_id or model.name

    def client_names(self, plan: Plan) -> tuple[str, ...]:
        """All names that clients may use: the engines' name, then the name that was asked for."""
        model, typed = plan.model, () if plan.serve is None else (plan.serve.argv[2],)
        known: tuple[str | None, ...] = ()
        if model.hub_id:
            known = (model.hub_id, model.hub_id.rpartition("/")[2], find_preset(model.hub_id))
        names = (self.client_name(model), *typed, *known, model.name)
        return tuple(dict.fromkeys(name for name in names if name))

    def names(self, plan: Plan) -> dict[str, str]:
        """The engines' name of the model, or of an adapter, by each name that clients may use."""
        known = dict.fromkeys(self.client_names(plan), self.client_name(plan.model))
        return known | {name: name for name in adapter_names(self.options)}


class ClusterServeConfig(ServeConfig):
    """One `turbofit serve --cluster`: every engine is started as on one machine."""

    request: PlanRequest = Field(description="what to plan for; it names no machine")
    gateway: GatewayConfig = Field(description="the front's public side")
    address: str | None = Field(default=None, description="Ray's; None is the cluster of this host")
    name: str = Field(description="what people call it; actors and folders have it")
    node_words: tuple[str, ...] = Field(
        default=(), description="options of each node's `turbofit serve`"
    )
