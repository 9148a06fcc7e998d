"""The planned device map as a command line of turbofit's server for Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError
from turbofit.planning.device_maps import folded

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["ENVIRONMENT", "MODULE", "arguments"]

#: What is run, with ``python -m``.
MODULE: Final = "turbofit.launch.fallback.server"
#: Torch grows its segments in place: without it the cache, which grows by a token at a time, and
#: the loader leave holes.
ENVIRONMENT: Final = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def arguments(plan: Plan, path: str, host: str, port: int) -> tuple[str, ...]:
    """The words; the first is ``turbofit-fallback``: who runs it puts ``python -m`` and `MODULE`.

    Raises:
        UsageError: the plan has no device map.
    """
    if plan.device_map is None:
        raise UsageError(
            "the plan has no device map, without which the fallback engine loads nothing",
            hint="plan with --engine transformers",
        )
    model, settings = plan.model, plan.settings
    return (
        "turbofit-fallback",
        "--model", path,
        "--served-name", model.hub_id or model.name,
        "--device-map", folded(plan.device_map),
        "--dtype", settings.dtype,
        "--session-len", str(settings.session_len),
        "--max-images", str(plan.limits.most_images(model.image_rule)),
        "--host", host,
        "--port", str(port),
    )  # fmt: skip
