"""What a person may ask of a prediction."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from turbofit.core.validation import Metavar
from turbofit.planning.request import Bytes, PlanRequest

__all__ = ["PredictRequest"]


class PredictRequest(PlanRequest):
    """A plan's request whose open settings are LMDeploy's defaults, and what a log said."""

    free_at_cache: Bytes | None = Field(
        default=None,
        description="free when the cache was sized, as a log said it; replaces everything before",
    )
    lmdeploy: Annotated[str | None, Metavar("VERSION")] = Field(
        default=None, description="LMDeploy's version (default 0.18)"
    )
