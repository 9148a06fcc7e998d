"""What a person may ask of `turbofit which`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from turbofit.core.validation import Metavar
from turbofit.planning.request import PlanRequest

__all__ = ["WhichRequest"]


class WhichRequest(PlanRequest):
    """A plan's request for machines, or models, that are looked for."""

    images_per_second: Annotated[float | None, Field(gt=0), Metavar("RATE")] = Field(
        default=None, description="images that the forecast of speed must reach, over all requests"
    )
    all_counts: bool = Field(
        default=False,
        description="also larger counts of a card of which fewer do; takes some seconds more",
    )
