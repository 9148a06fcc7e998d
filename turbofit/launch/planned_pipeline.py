"""LMDeploy's pipeline with every image held to a plan. Imports LMDeploy: import it late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmdeploy import Pipeline
from lmdeploy.serve.processors import MultimodalProcessor

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.model import TileRule
from turbofit.launch.hold import held_parameters, too_many_images
from turbofit.model.images import largest_limit

if TYPE_CHECKING:
    from turbofit.core.model import ImageRule
    from turbofit.core.plan import Limits, Plan

__all__ = ["PlannedPipeline", "PlannedProcessor"]


class PlannedProcessor(MultimodalProcessor):  # type: ignore[misc]  # LMDeploy has no types
    """The prompt processor of LMDeploy; images pass it after they are loaded, before any tiling.

    Args:
        base: LMDeploy's own, which this replaces.
        rule: the model's image rule.
        limits: the plan's.
    """

    def __init__(self, base: MultimodalProcessor, rule: ImageRule, limits: Limits) -> None:
        self.__dict__.update(vars(base))
        self._rule, self._limits = rule, limits

    async def async_parse_multimodal_item(
        self, messages: Any, *arguments: Any, **keywords: Any
    ) -> Any:
        """Refuse too many images before they are loaded, then lower what each asks.

        Raises:
            ValueError: more images than planned; LMDeploy makes it the request's own error.
        """
        refusal = too_many_images(self._limits, _count_images(messages))
        if refusal is not None:
            raise ValueError(refusal)
        parsed = await MultimodalProcessor.async_parse_multimodal_item(
            messages, *arguments, **keywords
        )
        for message in parsed:
            content = message.get("content")
            if message.get("role") in ("user", "tool") and isinstance(content, list):
                message["content"] = [self._held(item) for item in content]
        return parsed

    def _held(self, item: dict[str, Any]) -> dict[str, Any]:
        """One part of a message, lowered.

        Raises:
            ValueError: an image that no preprocessor takes.
        """
        if item.get("type") != "image" or "data" not in item:
            return item
        asked = {name: value for name, value in item.items() if name not in ("type", "data")}
        try:
            held = held_parameters(self._rule, self._limits, item["data"].size, asked)
        except UsageError as exc:
            raise ValueError(f"{exc.message}: {exc.hint}") from None
        return {"type": "image", "data": item["data"], **held}


class PlannedPipeline(Pipeline):  # type: ignore[misc]  # LMDeploy has no types
    """An `lmdeploy.Pipeline` that keeps its plan and holds images to it.

    Args:
        plan: what the settings come from.
        model_path: the checkpoint.
        **keywords: LMDeploy's.
    """

    def __init__(self, plan: Plan, model_path: str, **keywords: Any) -> None:
        super().__init__(model_path, **keywords)
        self.plan = plan
        rule = plan.model.image_rule
        processor = self.async_engine.prompt_processor
        if rule is None or plan.limits.vision_unit is None or processor.vl_encoder is None:
            return
        if not hasattr(type(processor), "async_parse_multimodal_item"):
            self.close()
            raise PackageError(
                "this LMDeploy has no place where images can be held to the plan",
                hint='install a known one with pip install "turbofit[lmdeploy]"',
            )
        self.async_engine.prompt_processor = PlannedProcessor(processor, rule, plan.limits)
        if isinstance(rule, TileRule) and not rule.client_knobs:
            _hold_processor(processor.vl_encoder.model, rule, plan.limits)


def _count_images(messages: Any) -> int:
    """Images of all turns: each is encoded again with every request."""
    listed = [messages] if isinstance(messages, dict) else messages
    return sum(
        1
        for message in listed
        if message.get("role") in ("user", "tool") and isinstance(message.get("content"), list)
        for item in message["content"]
        if isinstance(item, dict) and item.get("type") in ("image", "image_url", "image_data")
    )


def _hold_processor(model: Any, rule: TileRule, limits: Limits) -> None:
    """InternVL in the Transformers format reads no parameters: its processor's own limit is set."""
    planned = (
        rule.max_dynamic_patch if limits.max_dynamic_patch is None else limits.max_dynamic_patch
    )
    most = min(planned, largest_limit(rule, limits.units_per_image) or 1)
    model.processor.image_processor.max_patches = most
