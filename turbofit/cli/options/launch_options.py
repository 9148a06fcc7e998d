"""Options of what launches engines: `serve`, of one model or several, `calibrate` and `tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from turbofit.cli.command import option_name, refuse_together
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import LAST_PORT
from turbofit.core.validation import SECONDS, FilePath, Metavar, Validated, parsed
from turbofit.planning.request import Bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.json_types import Options
    from turbofit.launch.engine.engine_client import Timing

Seconds = Annotated[float, Field(ge=0, lt=1e6), SECONDS, Metavar("SECONDS")]


class LaunchOptions(Validated):
    """What both say of a launch, each field an option."""

    pretend: bool = Field(
        default=False,
        description="LMDeploy's real server and engine on pretend GPUs: nothing is computed",
    )
    pretend_taken: Bytes = Field(
        default=0,
        description="with --pretend: somebody takes so much of each card after the plan was made",
    )
    pretend_fail: Annotated[int | None, Field(ge=1), Metavar("N")] = Field(
        default=None,
        description="with --pretend: the N-th device allocation of an engine's first start fails",
    )
    no_rehearse: bool = Field(
        default=False, description="do not run the plan on pretend GPUs first"
    )
    forget: bool = Field(default=False, description="drop what earlier launches learned")

    def check(self) -> None:
        """Whether they go together.

        Raises:
            UsageError: they do not.
        """
        if self.pretend_taken and not self.pretend:
            raise UsageError("--pretend-taken takes nothing of real GPUs", hint="add --pretend")
        if self.pretend_fail and not self.pretend:
            raise UsageError("--pretend-fail fails nothing of real GPUs", hint="add --pretend")

    def config_fields(self) -> Options:
        return {
            "rehearse": not self.no_rehearse,
            "pretend": self.pretend,
            "pretend_taken": self.pretend_taken,
            "pretend_fail": self.pretend_fail,
        }


class ServeOptions(LaunchOptions):
    """What `serve` asks beside."""

    plan: FilePath | None = Field(default=None, description="launch what `plan --json` wrote")
    dry_run: bool = Field(default=False, description="print what would be launched")
    no_check: bool = Field(default=False, description="ready without answered worst-case requests")
    model_name: str | None = Field(
        default=None,
        min_length=1,
        description="what the model is called, beside its other names (default: its hub id, or "
        "the folder's name)",
    )
    no_gateway: bool = Field(
        default=False,
        description="no gateway: any client can then take the engines past the plan",
    )
    unplanned: bool = Field(
        default=False,
        description="pass LMDeploy options that change memory in ways the plan does not know",
    )
    drain: Seconds | None = Field(default=None, description="for open requests at the end (30)")
    liveness: Seconds | None = Field(
        default=None,
        description="between completions that show that an engine lives (60; 0: none)",
    )
    lease: FilePath | None = Field(
        default=None,
        description="end in order once nobody has touched this file for 120 s: whoever started it "
        "is gone",
    )
    cluster: Annotated[str | None, Metavar("RAY")] = Field(
        default=None, description="serve on all machines of a Ray cluster: ray, ray:ADDRESS"
    )
    name: str | None = Field(
        default=None, description="what the cluster calls it (default: the model's name)"
    )
    node_port: Annotated[int, Field(ge=0, le=LAST_PORT), Metavar("PORT")] = Field(
        default=0, description="where each node of the cluster listens (default: any free port)"
    )

    def check(self) -> None:
        """As of all launches; and what a cluster alone has needs one.

        Raises:
            UsageError: they do not go together.
        """
        super().check()
        for name in ("name", "node_port"):
            if self.cluster is None and name in self.given():
                raise needs_cluster(name)

    def named(self, model_name: str | None) -> ServeOptions:
        """The same with LMDeploy's own option of that name, where one follows ``--``.

        Raises:
            UsageError: both are given, and differ.
        """
        if model_name is None or model_name == self.model_name:
            return self
        if self.model_name is not None:
            raise UsageError(
                "--model-name is given twice, before and after --", hint="leave one of the two out"
            )
        return self.changed(model_name=model_name)

    def timing(self) -> Timing:
        """The deadlines that were given, the others as they are."""
        from turbofit.launch.engine.engine_client import Timing

        usual = Timing()
        return Timing(
            drain=usual.drain if self.drain is None else self.drain,
            liveness=usual.liveness if self.liveness is None else self.liveness,
        )

    def config_fields(self) -> Options:
        return {
            **super().config_fields(),
            "timing": self.timing(),
            "check": not self.no_check,
            "model_name": self.model_name,
        }


class CalibrateOptions(LaunchOptions):
    """What `calibrate` asks beside."""

    pretend: bool = Field(default=False, description="on pretend GPUs: nothing real is learned")
    forget: bool = Field(default=False, description="drop what was learned of this model, and end")
    again: bool = Field(default=False, description="measure again what was calibrated before")
    minutes: Annotated[float, Field(gt=0, lt=1e6), Metavar("N")] = Field(
        default=60.0, description="give up after these"
    )


def needs_cluster(name: str) -> UsageError:
    """Of an option that only a cluster has, where none is named."""
    return UsageError(
        f"{option_name(name)} is for a cluster, and none is named",
        hint=f"leave {option_name(name)} out, or add --cluster ray",
    )


# Models that take turns, share a machine or sleep.


#: Seconds that a request waits for its model's start: the deadline of OpenAI's clients.
_WAIT: Final = 600.0
Time = Annotated[float, Field(gt=0, lt=1e9), SECONDS, Metavar("TIME")]


class ModelsOptions(Validated):
    """When models' engines run, each field an option."""

    idle: Time | None = Field(
        default=None,
        description="end engines that nobody asked for so long, and start them again at the next "
        "request: 10m",
    )
    idle_answer: Literal["wait", "503"] = Field(
        default="wait",
        description="to requests for a model that is not ready: wait for its start, or 503 at "
        "once, with Retry-After",
    )
    wait: Time | None = Field(
        default=None, description="the longest wait of a request for its model's start (10m)"
    )

    swap: bool = Field(
        default=False,
        description="several models take turns: as many as fit run at once, the one that was used "
        "least recently makes way",
    )
    turn: Time | None = Field(
        default=None,
        description="with --swap: a model whose requests keep coming serves so long before it "
        "makes way (30s)",
    )

    @property
    def wait_seconds(self) -> float:
        """Seconds that a request waits; 0 where it is refused at once."""
        if self.idle_answer == "503":
            return 0.0
        return _WAIT if self.wait is None else self.wait

    def policy_fields(self) -> Options:
        """The fields of `ModelsPolicy` that they fill."""
        fields: dict[str, Any] = {"idle": self.idle, "turn": self.turn}
        return {name: value for name, value in fields.items() if value is not None}

    def check(self, models: Sequence[str], options: ServeOptions) -> None:
        """Whether they go together with the rest of the command line.

        Raises:
            UsageError: they do not.
        """
        several = len(models) > 1
        what = "several models" if several else "--idle"
        if not several and self.swap:
            raise UsageError("--swap needs two models or more", hint="turbofit serve A B --swap")
        if self.turn is not None and not self.swap:
            raise UsageError(
                "--turn is for models that take turns", hint="add --swap, or leave --turn out"
            )
        if not several and self.idle is None:
            if self.wait is not None or self.idle_answer != "wait":
                raise UsageError(
                    "--wait and --idle-answer are for engines that are not ready at times",
                    hint="add --idle 10m",
                )
            return
        refused = {
            "cluster": options.cluster is not None,
            "no_gateway": options.no_gateway,
            "model_name": several and options.model_name is not None,
            "plan": several and options.plan is not None,
            "dry_run": several and options.dry_run,
        }
        refuse_together(refused, what, "; turbofit plan A B shows the plans of several models")


_MOST_SHARE: Final = 1e6


def _shares(text: str, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        model, sign, value = part.strip().rpartition("=")
        try:
            share = float(value) if sign else 0.0
        except ValueError:
            share = 0.0
        if not model or not 0 < share < _MOST_SHARE or model in found:
            raise UsageError(
                f"{name} {part.strip()!r} is no share, or stands twice",
                hint="write it as MODEL=2,MODEL=1",
            )
        found[model] = share
    return found


class SharesOptions(Validated):
    """How several models divide the cards."""

    share: Annotated[dict[str, float] | None, parsed(_shares), Metavar("MODEL=N,...")] = Field(
        default=None,
        description="requests that each model's cache holds, beside the others' (default: as many "
        "for each): A=2,B=1",
    )

    def of_models(self, models: Sequence[str]) -> tuple[float, ...]:
        """Each model's share; 1 where none is given.

        Raises:
            UsageError: a share of a model that is not there or alone, or a model stands twice.
        """
        for name in self.share or {}:
            if name not in models:
                raise UsageError(
                    f"--share names {name}, which is not among the models",
                    hint=f"they are {', '.join(models)}",
                )
        if self.share and len(models) == 1:
            raise UsageError(
                "--share divides cards between models, and there is one",
                hint="leave --share out, or name the other models",
            )
        if len(set(models)) < len(models):
            raise UsageError("a model is named twice", hint="name each model once")
        return tuple((self.share or {}).get(name, 1.0) for name in models)
