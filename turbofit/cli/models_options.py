"""Options of `serve` for models that take turns, share a machine or sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from turbofit.core.validation import Metavar, Validated, parsed

if TYPE_CHECKING:
    from turbofit.core.json_types import Options

__all__ = ["ModelsOptions"]

#: Seconds that a request waits for its model's start: the deadline of OpenAI's clients.
_WAIT: Final = 600.0


def _seconds(text: str, name: str) -> float:
    from turbofit.launch.tune.slo import parse_seconds

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

    @property
    def wait_seconds(self) -> float:
        """Seconds that a request waits; 0 where it is refused at once."""
        if self.idle_answer == "503":
            return 0.0
        return _WAIT if self.wait is None else self.wait

    def policy_fields(self) -> Options:
        """The fields of `ModelsPolicy` that they fill."""
        fields: dict[str, Any] = {"idle": self.idle}
        return {name: value for name, value in fields.items() if value is not None}
