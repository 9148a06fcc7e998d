"""Models of real shapes made on the spot, and the plans that are tried with them on one GPU.

Weights are holes in files and read as zeros: memory is that of real weights. Zeros draw less power,
so that a card's clocks may be higher than with real ones; all settings are compared alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from turbofit import api
from turbofit.core.plan import Plan
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.twin import checkpoint_for

__all__ = ["Shape", "checkpoint", "defaults", "planned", "with_ratio"]


class Shape:
    """A model under one engine, as stages name it."""

    def __init__(self, model: str, engine: str = "turbomind") -> None:
        self.model, self.engine = model, engine

    @property
    def name(self) -> str:
        return f"{self.model}-{self.engine}"


def checkpoint(model: str, scratch: Path) -> Path:
    """A folder with the model's shapes, made where it is missing."""
    source = resolve_model(model)
    folder = scratch / "models" / source.name
    if (folder / "config.json").exists():
        return folder
    if source.architecture == "LlavaForConditionalGeneration":
        from bench.gpu.llava import write_llava

        return write_llava(source, folder)
    return checkpoint_for(source, folder)


def planned(shape: Shape, scratch: Path, **settings: Any) -> Plan:
    """turbofit's plan for one engine on the one GPU that is visible, as it is now."""
    folder = str(checkpoint(shape.model, scratch))
    return api.plan(folder, engine=shape.engine, tp=1, replicas=1, **settings)


def defaults(shape: Shape, scratch: Path, **settings: Any) -> Plan:
    """LMDeploy's defaults under what is given, and what turbofit predicts of them."""
    folder = str(checkpoint(shape.model, scratch))
    return api.predict(folder, engine=shape.engine, tp=1, **settings)


def with_ratio(plan: Plan, ratio: float) -> Plan:
    """The same launch with another ratio, and the same worst requests.

    The ledger is the first plan's: `planned` with all settings fixed has the ratio's own.
    """
    return replace(plan, settings=replace(plan.settings, cache_max_entry_count=ratio))


def fixed(plan: Plan) -> dict[str, Any]:
    """The keywords that make a plan of the same shape at another ratio."""
    settings, limits = plan.settings, plan.limits
    kept: dict[str, Any] = {
        "max_prefill_token_num": settings.max_prefill_token_num,
        "max_batch_size": settings.max_batch_size,
        "session_len": settings.session_len,
    }
    # A family whose images are one tile each has nothing to hold to it.
    if limits.max_dynamic_patch is not None and limits.units_per_image > 1:
        kept["max_dynamic_patch"] = limits.max_dynamic_patch
    if limits.max_pixels_per_image is not None:
        kept["max_pixels"] = limits.max_pixels_per_image
    return kept
