"""What a plan promises to its clients, and the limits by which the gateway keeps the promise.

A promise is made once, by `planning.plan_document.make_promise`, and given to every later plan of
the same request: a step down, a tuning, a rehearsal, a node of a cluster. These plans may change
settings, and keep the promise. Whoever wants to know what a client may send asks the promise.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta
from msgspec.structs import replace

from turbofit.core.images import ImageRule
from turbofit.core.messages import counted
from turbofit.core.struct import Struct, doc
from turbofit.core.units import three_digits

#: The most images of a request if the plan does not promise more. An image takes at least 2 ms of a
#: thread of LMDeploy's process, a photograph 30 to 100 ms; all clients wait for a single thread.
_MOST_IMAGES: Final = 64
#: Every chat without images may ask for this many answers (`n`), as many as LMDeploy allows.
_TEXT_COPIES: Final = 128


class Limits(Struct):
    """The limits that the gateway enforces; an image limit that does not apply is None."""

    vision_unit: Annotated[
        Literal["tile", "patch"] | None, doc("The unit of images; null: no images.")
    ]
    max_dynamic_patch: int | None
    max_pixels_per_image: int | None
    images_per_request: int
    units_per_image: int
    units_per_request: int
    image_tokens_per_request: int
    n: Annotated[int, doc("Answers of one request.")]
    bytes_per_image: int
    bytes_per_body: int

    @property
    def image_limit(self) -> int | None:
        """The image limit, in tiles or pixels; None if the model takes no images."""
        return self.max_dynamic_patch or self.max_pixels_per_image

    def with_image_limit(self, rule: ImageRule, limit: int | None) -> Limits:
        """Return the limits with another image limit, in the unit of ``rule``."""
        tiles = rule.plan_limit_name == "max_dynamic_patch"
        return replace(
            self,
            max_dynamic_patch=limit if tiles else None,
            max_pixels_per_image=None if tiles else limit,
        )

    def copies(self, *, images: bool) -> int:
        """Return the most answers that a request may ask for (``n``).

        ``images`` says whether the request has images. Answers that exceed an engine's batch wait
        in the engine like requests, and take no memory.
        """
        return self.n if images else max(self.n, _TEXT_COPIES)

    def most_images(self, rule: ImageRule | None) -> int:
        """Return the most images of a request, if all are as small as ``rule`` allows."""
        if rule is None or self.vision_unit is None:
            return 0
        sharing = min(_MOST_IMAGES, self.units_per_request // rule.least_units)
        return max(self.images_per_request, sharing)


class Promise(Struct):
    """The plan's promise to clients; planning makes the promise, and nothing changes it later.

    ``image_limit`` and ``images`` repeat figures of ``limits`` for readers of the document.
    """

    context: Annotated[
        int, doc("Tokens of one request, with its answer; 0: no request."), Meta(ge=0)
    ]
    images: Annotated[int, doc("Images of one request, each as large as the limits allow.")]
    image_limit: Annotated[
        int | None, doc("The most tiles or pixels of an image; null: no images.")
    ]
    requests: Annotated[
        int, doc("Requests that run at once over all engines, with all their tokens.")
    ]
    request_tokens: Annotated[int, doc("Tokens of each such request, with images at their limit.")]
    limits: Annotated[Limits, doc("What the gateway enforces.")]

    def __post_init__(self) -> None:
        limits = self.limits
        if (self.images, self.image_limit) != (limits.images_per_request, limits.image_limit):
            raise ValueError("a promise's images and image_limit are those of its limits")

    @property
    def takes_images(self) -> bool:
        """Whether a request may have images."""
        return self.limits.vision_unit is not None

    def largest_image(self, rule: ImageRule | None) -> tuple[int, int]:
        """Return the units of the largest image that is answered, and a request's image tokens.

        The request has ``images`` images of this size. Images and one token of text must fit into
        the context: LMDeploy refuses larger images, which only a prediction's limits admit.
        """
        limits, room = self.limits, self.context - 1
        if rule is None or room < 0 or limits.image_tokens_per_request <= room:
            return limits.units_per_image, limits.image_tokens_per_request
        return rule.images_in(limits.images_per_request, room, limits.units_per_image)

    def words(self, rule: ImageRule | None, size: str = "") -> str:
        """Return a sentence on what one request may have; ``size`` replaces the largest image."""
        if not self.takes_images:
            return f"{self.context:,} tokens a request, with its answer"
        (units, tokens), limits = self.largest_image(rule), self.limits
        largest = size or counted(units, limits.vision_unit or "unit")
        if not size and limits.max_pixels_per_image is not None:
            largest = f"{three_digits(limits.max_pixels_per_image / 1e6)} MP"
        images = f"{counted(self.images, 'image')} of up to {largest}"
        return f"{images} ({counted(tokens, 'token')}), {self.context:,} tokens in all"

    def why_broken(self, other: Promise, rule: ImageRule | None) -> str:
        """Return how ``other`` promises clients less than this promise; empty if it keeps it.

        How many requests run at once is no promise to a client: the others wait.
        """
        if rule is not None and (other.image_limit or 0) < (self.image_limit or 0):
            most, promised = other.image_limit or 0, self.image_limit
            return f"serves images of {most:,} {rule.limit_unit} at most, {promised:,} are promised"
        if self.takes_images and other.images < self.images:
            return f"serves {other.images} of {counted(self.images, 'image')} in a request"
        if other.context < self.context:
            return (
                f"holds {other.context:,} tokens under the promised images, {self.context:,} are"
                " promised"
            )
        return ""

    def keeps(self, other: Promise, rule: ImageRule | None) -> bool:
        """Return whether this promise gives clients no less than ``other``."""
        return not other.why_broken(self, rule)

    def with_image_limit(self, rule: ImageRule, limit: int) -> Promise:
        """Return the promise with another image limit, in the unit of ``rule``."""
        limits = self.limits.with_image_limit(rule, limit)
        return replace(self, image_limit=limits.image_limit, limits=limits)
