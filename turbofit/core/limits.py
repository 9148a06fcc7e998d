"""What requests are held to, and what other image limits would leave."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from turbofit.core.images import ImageRule
from turbofit.core.struct import Struct, doc

__all__ = ["Held", "LimitCost", "Limits"]

#: Images of one request, where the plan does not promise more. Each costs LMDeploy's one thread for
#: preprocessing 2 ms at the least and about 30 ms as a photograph, and all clients wait for it.
_MOST_IMAGES: Final = 64


class Limits(Struct):
    """What the gateway enforces; None where the limit has no meaning for the model."""

    vision_unit: Annotated[
        Literal["tile", "patch"] | None,
        doc("What images are counted in; null without images."),
    ]
    max_dynamic_patch: int | None
    max_pixels_per_image: int | None
    images_per_request: int
    units_per_image: int
    units_per_request: int
    units_per_forward: Annotated[int, doc("Units that the peak pays for in one forward pass.")]
    image_tokens_per_request: int
    n: Annotated[int, doc("Answers of one request.")]
    bytes_per_image: int
    bytes_per_body: int

    @property
    def image_limit(self) -> int | None:
        """The limit of an image, in what its rule counts; None without images."""
        return self.max_dynamic_patch or self.max_pixels_per_image

    def most_images(self, rule: ImageRule | None) -> int:
        """How many images a request may have: as many as share its units, however small."""
        if rule is None or self.vision_unit is None:
            return 0
        sharing = min(_MOST_IMAGES, self.units_per_request // rule.least_units)
        return max(self.images_per_request, sharing)


class Held(Struct):
    """How many requests run at once with all their tokens in the caches, where it was asked."""

    requests: Annotated[int, doc("Over all engines; a plan fits with workload.concurrency.")]
    request_tokens: Annotated[
        int,
        doc(
            "Tokens of each: its images at their limit, the assumed text and answer; no more "
            "than session_len."
        ),
    ]


class LimitCost(Struct):
    """What one image limit leaves, on the plan's GPUs and with its prefill: at least so much."""

    limit: Annotated[int, doc("Tiles or pixels of an image.")]
    option: Annotated[str, doc("The option that asks for it.")]
    image_tokens: Annotated[int, doc("Tokens of one image of the worst size.")]
    kv_tokens: Annotated[int, doc("Tokens of all groups.")]
    requests_at_once: Annotated[int, doc("Requests that run at once over all groups.")]
    requests_per_second: Annotated[float, doc("A forecast for images of the worst size.")]
    seconds_to_first_token: Annotated[float, doc("A forecast for images of the worst size.")]
