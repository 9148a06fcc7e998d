"""turbofit: plans the GPU memory of LMDeploy servers, and keeps clients within the plan.

    >>> import turbofit
    >>> turbofit.plan("internvl2-8b", on="4xrtx3090").verdict
    >>> pipe = turbofit.pipeline("OpenGVLab/InternVL2-8B")        # needs LMDeploy

``import turbofit`` loads almost nothing; each name below is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.core.version import __version__

if TYPE_CHECKING:
    from turbofit.api import diagnose, pipeline, plan, predict, rehearse, which
    from turbofit.core.plan import Plan
    from turbofit.planning.request import PlanRequest

__all__ = [
    "Plan", "PlanRequest", "__version__", "diagnose", "pipeline", "plan", "predict",
    "rehearse", "which",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'turbofit' has no attribute {name!r}")
    from turbofit import api

    value = getattr(api, name)
    return value if isinstance(value, type) else api.at_the_door(value)


def __dir__() -> list[str]:
    return __all__
