"""The types of forecasts: of the engines' speed, and of how fast the host prepares images."""

from __future__ import annotations

from typing import Annotated, Literal

from turbofit.core.messages import counted
from turbofit.core.struct import Struct, doc
from turbofit.core.units import two_digits


class HostImages(Struct):
    """A forecast of how fast the host prepares the workload's images.

    If the host is slower than the GPUs, the host's speed decides the requests a second.
    """

    cores: Annotated[int, doc("Cores whose time the engines' image threads may use.")]
    images_per_second: Annotated[float, doc("Images that these cores prepare.")]
    gpu_images_per_second: Annotated[
        float | None, doc("Images that the GPUs process; null: no forecast is shown.")
    ]
    measured: Annotated[bool, doc("False: the speed of a usual core is assumed.")]

    @property
    def binds(self) -> bool:
        """Whether the host prepares fewer images a second than the GPUs take."""
        return self.images_per_second < (self.gpu_images_per_second or 0.0)

    @property
    def words(self) -> str:
        """The rates of the host and, if known, of the GPUs, in words."""
        cores = counted(self.cores, "core")
        prepare = "prepares" if self.cores == 1 else "prepare"
        text = f"{cores} {prepare} {two_digits(self.images_per_second)} images/s"
        taken = self.gpu_images_per_second
        return text if taken is None else f"{text}, the GPUs take {two_digits(taken)}"


class Surety(Struct):
    """How sure a forecast is, by the errors of earlier forecasts of the same kind."""

    kind: Annotated[str, doc("Images or text, and the model, engine and cards.")]
    word: Annotated[
        Literal["good", "fair", "rough", "order", "unknown"],
        doc(
            "Nine of ten figures are off by at most 1.25 times (good), 1.5 (fair), 2 (rough), or by"
            " more (order); one word worse on cards without a figure. unknown: no figure was"
            " compared. Forecasts of the kinds order and unknown are not shown."
        ),
    ]
    figures: Annotated[int, doc("The number of compared figures.")] = 0
    median: Annotated[float | None, doc("Half of the figures differ by at most this share.")] = None
    p90: Annotated[float | None, doc("Nine of ten figures differ by at most this share.")] = None
    worst: Annotated[float | None, doc("The factor by which the worst figure is off.")] = None
    seen: Annotated[bool, doc("Whether figures of all these cards were compared.")] = False
    measured: Annotated[str, doc("What others measured, if no forecast is shown.")] = ""

    @property
    def known(self) -> bool:
        """Whether a forecast of this kind is shown: nine of ten are within a factor of two."""
        return self.word not in ("order", "unknown")

    def shown(self, value: float, digits: int) -> float | None:
        """Return the rounded forecast; None if forecasts of this kind are not shown."""
        return round(value, digits) if self.known else None

    @property
    def why(self) -> str:
        """Why no forecast of this kind is shown, in words."""
        if self.worst is None:
            return f"nobody has measured {self.kind}"
        # Figures of other cards say nothing of these.
        measured = f" ({self.measured})" if self.measured and self.seen else ""
        return f"not known: forecasts of {self.kind} are too far off{measured}"

    @property
    def words(self) -> str:
        """The distribution of the errors, in words."""
        if self.median is None or self.p90 is None or self.worst is None:
            return f"{self.kind}: no figure is known"
        return (
            f"{self.kind}: median error {self.median:.1%}, p90 {self.p90:.1%}, worst"
            f" {self.worst:.1f} times over {counted(self.figures, 'figure')}"
            f"{'' if self.seen else ' of other cards'}"
        )


class Throughput(Struct):
    """A forecast of speed, never a promise; ``basis`` says what the forecast rests on.

    Each figure has the surety of its own kind, and is null if such forecasts are not shown.

    ``seconds_to_first_token`` is for a request that comes while all other requests are running.
    """

    basis: str
    requests_per_second: float | None
    output_tokens_per_second: float | None
    concurrent_requests: int
    seconds_to_first_token: float | None = None
    seconds_to_first_token_alone: Annotated[
        float | None, doc("For a request with the largest images to an idle engine.")
    ] = None
    seconds_to_first_token_of_text: Annotated[
        float | None, doc("For a request without images to an idle engine.")
    ] = None
    surety: Annotated[Surety | None, doc("Surety of requests and tokens a second.")] = None
    first_token: Annotated[Surety | None, doc("Surety of `seconds_to_first_token`.")] = None
    first_token_alone: Annotated[
        Surety | None, doc("Surety of `seconds_to_first_token_alone`.")
    ] = None
    first_token_of_text: Annotated[
        Surety | None, doc("Surety of `seconds_to_first_token_of_text`.")
    ] = None
    host: Annotated[
        HostImages | None, doc("Null: no images, or the number of the host's cores is unknown.")
    ] = None


class UsualImage(Struct):
    """A forecast for requests whose images have a usual size, under the plan's own settings.

    Each figure has the surety of the same figure for the largest images, and is null if that figure
    is null.
    """

    image_size: Annotated[tuple[int, int], doc("Pixels: width, height.")]
    image_tokens: Annotated[int, doc("Tokens of one such image.")]
    requests_at_once: Annotated[int, doc("Requests that run at once over all groups.")]
    requests_per_second: float | None
    seconds_to_first_token: float | None
    host: Annotated[
        HostImages | None, doc("The same as in the forecast for the largest images.")
    ] = None
    seconds_to_first_token_alone: Annotated[
        float | None, doc("For a request to an idle engine.")
    ] = None
