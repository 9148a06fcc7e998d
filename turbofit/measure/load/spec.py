"""The specification of a load: its requests, how they arrive, and when it ends."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from turbofit.core.errors import UsageError
from turbofit.core.validation import SECONDS, Metavar, Positive, Validated
from turbofit.planning.request import Count, Size, Tokens, TokensOrNone

Seconds = Annotated[float, Field(gt=0, lt=1e6), SECONDS, Metavar("SECONDS")]
Pause = Annotated[float, Field(ge=0, lt=1e6), SECONDS, Metavar("SECONDS")]

_SECONDS: Final = 60.0
_CONCURRENCY: Final = 8


class LoadSpec(Validated):
    """One load. Without a rate it is a closed loop: each answer lets the next request begin."""

    images: Count = Field(default=1, description="images a request")
    image_size: Size = Field(default=(1024, 768), description="width and height of an image")
    prompt_tokens: Tokens = Field(
        default=256, description="words before an answer, about a token each"
    )
    shared_prefix: Count = Field(
        default=0, description="tokens with which all prompts begin alike, of --prompt-tokens"
    )
    output_tokens: TokensOrNone = Field(
        default=128, description="tokens of an answer; 0: a request states none, as SDKs do"
    )
    whole: bool = Field(default=False, description="answers come in one piece, as SDKs ask for")
    stop_early: bool = Field(
        default=False,
        description="an answer may end before its --output-tokens (else ignore_eos is sent)",
    )
    turns: Positive = Field(
        default=1,
        description="turns of a conversation: each later one sends --prompt-tokens more, with all"
        " that was said before; images are in the first",
    )
    pause: Pause = Field(
        default=0.0, description="time between an answer and the next turn of its conversation"
    )
    concurrency: Positive | None = Field(
        default=None,
        description=f"requests at once, in a closed loop (default {_CONCURRENCY}; tune: twice what"
        " the plan runs, 128 at most)",
    )
    rate: Annotated[float | None, Field(gt=0, lt=1e6), Metavar("PER-SECOND")] = Field(
        default=None,
        description="requests that arrive a second, whatever is answered: an open loop (Poisson)",
    )
    requests: Positive | None = Field(default=None, description="requests that are measured")
    seconds: Seconds | None = Field(
        default=None,
        description=f"time that is measured (default {_SECONDS:g}, or --requests; tune: 30)",
    )
    warm_up: Count | None = Field(
        default=None,
        description="requests that come before and do not count (default: --concurrency; 8 with "
        "--rate)",
    )
    timeout: Seconds = Field(default=600.0, description="the longest that a request may take")

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: the first such option.
        """
        if self.concurrency is not None and self.rate is not None:
            raise UsageError(
                "--concurrency and --rate do not go together",
                hint="a load is a closed loop or an open one",
            )
        if self.shared_prefix >= self.prompt_tokens and self.shared_prefix:
            raise UsageError(
                f"--shared-prefix {self.shared_prefix} is no part of {self.prompt_tokens} tokens",
                hint="raise --prompt-tokens",
            )
        if self.pause and self.turns == 1:
            raise UsageError(
                "--pause is between the turns of a conversation, and --turns is 1",
                hint="give --turns, or leave --pause out",
            )

    def slower(self, times: float) -> LoadSpec:
        """Return the load for a server on which everything takes ``times`` as long."""
        seconds, rate = self.measured_seconds, self.rate
        return self.changed(
            timeout=times * self.timeout,
            seconds=seconds and times * seconds,
            pause=times * self.pause,
            rate=rate and rate / times,
        )

    @property
    def at_once(self) -> int | None:
        """The number of requests at once in a closed loop; None in an open loop."""
        return None if self.rate is not None else self.concurrency or _CONCURRENCY

    @property
    def ends_early(self) -> bool:
        """Whether answers end where the model ends them."""
        return self.stop_early or not self.output_tokens

    @property
    def measured_seconds(self) -> float | None:
        """The seconds of the measured window; None if a number of requests ends the window."""
        return _SECONDS if self.seconds is None and self.requests is None else self.seconds

    @property
    def warm_up_requests(self) -> int:
        """The number of requests before the window."""
        return (self.at_once or _CONCURRENCY) if self.warm_up is None else self.warm_up
