"""Options of `serve`, `calibrate` and `tune`, and the configuration of their runs."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from turbofit.core.errors import UsageError, option_of
from turbofit.core.messages import refuse_together
from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.core.process.network import DEFAULT_PORT, LAST_PORT
from turbofit.core.struct import Options
from turbofit.core.validation import SECONDS, FilePath, Metavar, Validated
from turbofit.gateway.config import GatewayConfig
from turbofit.model.presets import find_preset
from turbofit.planning.request import PlanRequest
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.engine.worst_requests import CheckMode

Seconds = Annotated[float, Field(ge=0, lt=1e6), SECONDS, Metavar("SECONDS")]
#: How much slower pretend GPUs are than the forecast: 1 is as fast as forecast, 0 takes no time.
Slower = Annotated[float | None, Field(ge=0, le=1000), Metavar("N")]


class LaunchOptions(Validated):
    """Options of the runs of `serve`, `calibrate` and `tune`."""

    #: The factor of the clock without ``--clock``; 0: forwards of pretend GPUs take no time.
    usual_clock: ClassVar[float] = 1.0

    pretend: bool = False
    no_rehearse: bool = False
    forget: bool = False
    clock: Slower = None

    def refuse_real_clock(self) -> None:
        """Refuse ``--clock`` without ``--pretend``.

        Raises:
            UsageError: ``clock`` is given for real GPUs.
        """
        if self.clock is not None and not self.pretend:
            raise UsageError(
                "--clock is the time of pretend GPUs, and these GPUs are real",
                hint="add --pretend",
                options=["clock"],
            )

    def run_fields(self) -> Options:
        """Return the given fields of `RunOptions`, and the clock's factor of pretend GPUs."""
        read = RunOptions.model_fields
        given = {name: value for name, value in self.given().items() if name in read}
        factor = self.usual_clock if self.clock is None else self.clock
        return {**given, "clock": factor * self.pretend}


class RunOptions(LaunchOptions):
    """Further options of a run, which only `serve` takes."""

    check: CheckMode = "auto"
    no_standby: bool = False
    model_name: Annotated[str | None, Field(min_length=1)] = None


class ServeOptions(RunOptions):
    """Further options of `serve`."""

    plan: FilePath | None = None
    dry_run: bool = False
    no_gateway: bool = False
    unplanned: bool = False
    drain: Seconds | None = None
    liveness: Seconds | None = None
    cluster: Annotated[str | None, Metavar("RAY")] = None
    name: str | None = None
    node_port: Annotated[int, Field(ge=0, le=LAST_PORT), Metavar("PORT")] = 0
    idle: Annotated[float | None, Field(gt=0, lt=1e9), SECONDS, Metavar("TIME")] = None

    @property
    def timing(self) -> Timing:
        given = self.given()
        return Timing(**{name: given[name] for name in ("drain", "liveness") if name in given})

    def refuse_alone(self) -> None:
        """Refuse an option that needs a missing option, or that excludes another given option.

        Raises:
            UsageError: the first such option.
        """
        if self.idle is not None:
            beside = {"cluster": self.cluster is not None, "no_gateway": self.no_gateway}
            refuse_together(beside, "--idle")
        self.refuse_real_clock()
        for name in ("name", "node_port"):
            if self.cluster is None and name in self.given():
                raise needs_cluster(name)


class CalibrateOptions(LaunchOptions):
    """Further options of `calibrate`."""

    usual_clock: ClassVar[float] = 0.0  # on pretend GPUs no forward is measured

    minutes: Annotated[float, Field(gt=0, lt=1e6), Metavar("N")] = 60.0


class TuneOptions(LaunchOptions):
    """Options of `tune`, without the options of a plan and a load."""

    usual_clock: ClassVar[float] = 4.0  # so slow that this host can send the load

    time: Annotated[str, Metavar("TIME")] = "20m"
    starts: Annotated[int, Field(ge=1, le=1000), Metavar("N")] = 6
    slo: Annotated[str | None, Metavar("LIMITS")] = None
    kv_types: Annotated[str, Metavar("LIST")] = "0,8"

    @property
    def kv_policies(self) -> tuple[int, ...]:
        """The values of ``--quant-policy`` to try, without repeats.

        Raises:
            UsageError: a word of the list is no KV type.
        """
        types = [part.strip() for part in self.kv_types.split(",")]
        if not {*types} <= {"0", "4", "8", "16", "17"}:
            raise UsageError(
                f"--kv-types {self.kv_types!r} is no list of KV types",
                hint="write it as 0,8 or 0,8,4",
            )
        return tuple(map(int, dict.fromkeys(types)))


class ServeConfig(RunOptions):
    """One `turbofit serve` on one machine.

    >>> ServeConfig(request=PlanRequest(model="internvl2-8b"), gateway=GatewayConfig(port=8000))
    """

    request: PlanRequest | None = Field(
        default=None,
        description="the request to plan; None with a given plan",
    )
    plan: Plan | None = Field(default=None, description="the plan to launch, unchanged")
    gateway: GatewayConfig | None = Field(
        default=None, description="the public side; None for engines that clients reach themselves"
    )
    port: int = Field(
        default=DEFAULT_PORT,
        ge=0,
        le=LAST_PORT,
        description="the first engine's port, without a gateway",
    )
    timing: Timing = Field(default=Timing(), description="deadlines and pauses")
    options: tuple[str, ...] = Field(default=(), description="LMDeploy's own options, passed on")
    unplanned: tuple[str, ...] = Field(default=(), description="options that no plan counts")
    api_key: str | None = Field(default=None, description="the engines' key, without a gateway")
    access_log: str | None = Field(
        default=None, description="a file, - for stderr, none for no log; None: in the run's folder"
    )

    def client_name(self, model: Model) -> str:
        """Return the name by which the engines call a model."""
        return self.model_name or model.hub_id or model.name

    def client_names(self, plan: Plan) -> tuple[str, ...]:
        """Return all names that clients may use for the model, the engines' own name first."""
        model, typed = plan.model, () if plan.serve is None else (plan.serve.argv[2],)
        of_hub: tuple[str | None, ...] = ()
        if model.hub_id:
            of_hub = (model.hub_id, model.hub_id.rpartition("/")[2], find_preset(model.hub_id))
        names = (self.client_name(model), *typed, *of_hub, model.name)
        return tuple(dict.fromkeys(name for name in names if name))

    def names(self, plan: Plan) -> dict[str, str]:
        """Map each name that clients may use to the engines' name of the model or the adapter."""
        known = dict.fromkeys(self.client_names(plan), self.client_name(plan.model))
        return known | {adapter.name: adapter.name for adapter in plan.model.loras}

    def refuse_names(self, plan: Plan) -> None:
        """Refuse an adapter with a name of the model: clients could ask only one of the two.

        Raises:
            UsageError: an adapter has a name that clients may use for the model.
        """
        of_model = self.client_names(plan)
        for adapter in plan.model.loras:
            if adapter.name in of_model:
                raise UsageError(
                    f"an adapter is called {adapter.name}, and so is the model here: clients could"
                    " ask only one of the two",
                    hint="give the adapter another name, or choose another --model-name",
                )


class ClusterServeConfig(ServeConfig):
    """One `turbofit serve --cluster`; each node starts its engines as one machine does."""

    request: PlanRequest = Field(description="the request to plan, which names no machine")
    gateway: GatewayConfig = Field(description="the front's public side")
    address: str | None = Field(default=None, description="Ray's address; None: the cluster here")
    name: str = Field(description="the run's name, which actors and folders have")
    node_words: tuple[str, ...] = Field(
        default=(), description="options of each node's `turbofit serve`"
    )


def needs_cluster(name: str) -> UsageError:
    """Return the error for an option that needs a cluster, when no cluster is named."""
    return UsageError(
        f"{option_of(name)} is for a cluster, and --cluster is missing",
        hint=f"leave {option_of(name)} out, or add --cluster ray",
    )


def refuse_elsewhere(request: PlanRequest, does: str, beside: str = "") -> None:
    """Refuse ``--on`` for a command that uses the GPUs here: ``--on`` names another machine.

    ``does`` begins the message; ``beside`` is a further part of the hint.

    Raises:
        UsageError: the request names a machine.
    """
    if request.on is not None:
        raise UsageError(
            f"{does} the machine here, and `--on` names another machine",
            hint=f"add `--pretend` for pretend GPUs{beside}; turbofit plan MODEL --on {request.on} "
            "plans for that machine",
        )


def ray_address(text: str) -> str | None:
    """Return the address in ``ray:ADDRESS``; None for ``ray``, the cluster of this host.

    Raises:
        UsageError: the text names no Ray cluster.
    """
    kind, _, address = text.partition(":")
    if kind != "ray":
        named = f"--cluster {text[:60]!r}"
        raise UsageError(f"{named} is no Ray cluster", hint="write ray, or ray:HOST:6379")
    return address or None
