"""Options of `serve` for models that take turns, share a machine or sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from turbofit.core.errors import UsageError
from turbofit.core.validation import Metavar, Validated, parsed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.cli.options.launch_options import ServeOptions
    from turbofit.core.json_types import Options

__all__ = ["ModelsOptions", "SharesOptions"]

#: Seconds that a request waits for its model's start: the deadline of OpenAI's clients.
_WAIT: Final = 600.0


def _seconds(text: str, name: str) -> float:
    from turbofit.launch.tune.search import parse_seconds

    return parse_seconds(text, name)


Time = Annotated[float, Field(gt=0, lt=1e9), parsed(_seconds), Metavar("TIME")]


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
            "no-gateway": options.no_gateway,
            "model-name": several and options.model_name is not None,
            "plan": several and options.plan is not None,
            "dry-run": several and options.dry_run,
        }
        for name, given in refused.items():
            if given:
                raise UsageError(
                    f"--{name} and {what} do not go together",
                    hint="leave one out; turbofit plan A B shows the plans of several models",
                )


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
