"""Forecasts of speed, how sure each is, and of how fast the host prepares images."""

from __future__ import annotations

from typing import Annotated, Literal

from turbofit.core.messages import plural
from turbofit.core.struct import Struct, doc
from turbofit.core.units import two_digits


class HostImages(Struct):
    """A forecast of how fast the host prepares the workload's images.

    If the host is slower than the GPUs, the host's speed decides the requests a second.
    """

    cores: Annotated[int, doc("Those whose time the engines' threads for images may use.")]
    seconds_per_image: Annotated[float, doc("Processor seconds of one core.")]
    images_per_second: Annotated[float, doc("What these cores prepare.")]
    gpu_images_per_second: Annotated[
        float | None, doc("What the GPUs take; null: no forecast of them can be trusted.")
    ]
    measured: Annotated[bool, doc("Whether this host was measured, or a usual core is assumed.")]

    @property
    def binds(self) -> bool:
        """Whether the host prepares fewer images a second than the GPUs take."""
        return self.images_per_second < (self.gpu_images_per_second or 0.0)

    @property
    def words(self) -> str:
        """The rates of the host and, if known, of the GPUs, in words."""
        cores = f"{self.cores} {plural(self.cores, 'core')}"
        prepare = "prepares" if self.cores == 1 else "prepare"
        text = f"{cores} {prepare} {two_digits(self.images_per_second)} images/s"
        taken = self.gpu_images_per_second
        return text if taken is None else f"{text}, the GPUs take {two_digits(taken)}"


class Surety(Struct):
    """How sure a forecast is, by the errors of earlier forecasts of the same kind."""

    kind: Annotated[str, doc("What was compared: images or text, of which model, engine, cards.")]
    word: Annotated[
        Literal["good", "fair", "rough", "order", "unknown"],
        doc(
            "Nine of ten figures are off by at most 1.25, 1.5 or 2 times, or (order) by more, and a"
            " word less sure on cards of which there is none; unknown: there is no figure. Of the"
            " last two no figure is told."
        ),
    ]
    figures: Annotated[int, doc("Those that were compared.")] = 0
    median: Annotated[float | None, doc("Share by which half of them differ, at most.")] = None
    p90: Annotated[float | None, doc("Share by which nine of ten differ, at most.")] = None
    worst: Annotated[float | None, doc("By how many times the worst one is off.")] = None
    seen: Annotated[bool, doc("Whether figures of all of these cards are among them.")] = False
    measured: Annotated[str, doc("What others measured of a kind that is not told; or empty.")] = ""

    @property
    def known(self) -> bool:
        """Whether a figure of this kind is told: nine of ten are within a factor of two."""
        return self.word not in ("order", "unknown")

    def told(self, value: float, digits: int) -> float | None:
        """Return the rounded figure; None if no figure of this kind is told."""
        return round(value, digits) if self.known else None

    @property
    def why(self) -> str:
        """Why no figure is told, in words."""
        measured = f" ({self.measured})" if self.measured else ""
        if self.worst is None:
            return f"nobody has measured {self.kind}{measured}"
        return (
            f"forecasts of {self.kind} were up to {self.worst:.1f} times off"
            f"{'' if self.seen else ', of other cards'}{measured}"
        )

    @property
    def words(self) -> str:
        """The distribution of the errors, in words."""
        if self.median is None or self.p90 is None or self.worst is None:
            return f"{self.kind}: no figure is known"
        return (
            f"{self.kind}: median error {self.median:.1%}, p90 {self.p90:.1%}, worst"
            f" {self.worst:.1f} times over {self.figures} {plural(self.figures, 'figure')}"
            f"{'' if self.seen else ' of other cards'}"
        )


class Throughput(Struct):
    """A forecast of speed, never a promise; ``basis`` says what it rests on.

    Each figure has a surety of its own kind, and is null where that tells no figure.

    ``seconds_to_first_token`` is for a request that comes while all other requests are running.
    """

    basis: str
    requests_per_second: float | None
    output_tokens_per_second: float | None
    concurrent_requests: int
    seconds_to_first_token: float | None = None
    seconds_to_first_token_alone: Annotated[
        float | None, doc("Of a request that finds the engine idle, its images the largest.")
    ] = None
    seconds_to_first_token_of_text: Annotated[
        float | None, doc("Of a request without images that finds the engine idle.")
    ] = None
    median_error: Annotated[
        float | None, doc("Share by which half of the figures of this kind differ, at most.")
    ] = None
    surety: Annotated[Surety | None, doc("Of requests and tokens a second.")] = None
    first_token: Annotated[Surety | None, doc("Of the first token among others.")] = None
    first_token_alone: Annotated[Surety | None, doc("Of the first token alone.")] = None
    first_token_of_text: Annotated[Surety | None, doc("Of a text's first token alone.")] = None
    host: Annotated[
        HostImages | None, doc("Null: no images, or nobody knows the host's cores: not counted.")
    ] = None


class UsualImage(Struct):
    """A forecast for requests whose images have a usual size, under the plan's own settings.

    Each figure is as sure as the same one of the largest images; null as there.
    """

    image_size: Annotated[tuple[int, int], doc("Pixels: width, height.")]
    image_tokens: Annotated[int, doc("Tokens of one such image.")]
    requests_at_once: Annotated[int, doc("Requests that run at once over all groups.")]
    requests_per_second: float | None
    seconds_to_first_token: float | None
    host: Annotated[HostImages | None, doc("As of the forecast of all images.")] = None
    seconds_to_first_token_alone: Annotated[
        float | None, doc("Of a request that finds the engine idle.")
    ] = None
