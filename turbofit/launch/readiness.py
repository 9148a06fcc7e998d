"""The requests that an engine must answer before it counts as ready.

The first is the worst that a client may send. The second brings the executor's pool to the size
that the plan pays for: what the plan's worst forward holds, asked for by one request. It goes to
the engine directly, past the gateway, which would refuse it.
"""

from __future__ import annotations

from base64 import b64encode
from math import isqrt
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.model import PatchRule, TileRule
from turbofit.launch.image import flat_png, knobs, worst_size

if TYPE_CHECKING:
    from turbofit.core.plan import Plan

__all__ = ["Question", "questions", "worst_request"]

#: Prompt tokens beside what is asked for: a chat template, a question, and the answer.
_TEXT: Final = 256
_ANSWER: Final = 2


class Question:
    """Requests that are sent together, and what they are for."""

    def __init__(self, name: str, bodies: list[dict[str, Any]]) -> None:
        self.name, self.bodies = name, bodies


def questions(plan: Plan, model: str) -> list[Question]:
    """What to ask, in order; empty for a model without images whose warm-up is its worst case."""
    asked = []
    worst = worst_request(plan, model)
    if worst is not None:
        asked.append(Question("a worst-case request", [worst]))
    deciding = next((term.term for gpu in plan.gpus for term in gpu.ledger if term.worst), "")
    image = _whole_forward(plan, model) if deciding == "vision_forward" else None
    if image is not None:
        asked.append(Question("the fullest forward", [image]))
    return asked


def worst_request(plan: Plan, model: str) -> dict[str, Any] | None:
    """A chat request with as many images as the plan allows, each of the worst size.

    None for a model without images.
    """
    size = worst_size(plan)
    if size is None:
        return None
    part = _image(size, knobs(plan))
    return _chat(model, [part] * plan.limits.images_per_request)


def _whole_forward(plan: Plan, model: str) -> dict[str, Any] | None:
    """One image of as many units as the plan lets meet in a forward: it is encoded at once.

    None where no client can ask for such an image, or it is too long for a session.
    """
    rule, units = plan.model.image_rule, plan.limits.units_per_forward
    if rule is None or units <= plan.limits.units_per_request:
        return None
    room = min(plan.settings.session_len, plan.kv.tokens) - _TEXT - _ANSWER
    if isinstance(rule, TileRule):
        if not rule.client_knobs:
            return None
        units = min(units, room // max(1, rule.tokens_per_tile))
        tiles = units - 1 if rule.thumbnail and units > 1 else units
        return _chat(model, [_image(_grid(tiles, rule.tile_size), {"max_dynamic_patch": tiles})])
    assert isinstance(rule, PatchRule)
    windows = min(units // rule.merge**2, room)
    side = rule.patch_size * rule.merge
    rows = isqrt(windows)
    size = (side * (windows // rows), side * rows)
    pixels = {"min_pixels": rule.min_pixels, "max_pixels": size[0] * size[1]}
    return _chat(model, [_image(size, pixels)])


def _grid(tiles: int, side: int) -> tuple[int, int]:
    """Width and height of an image that is cut into so many tiles."""
    columns = next(n for n in range(isqrt(tiles), 0, -1) if tiles % n == 0)
    return side * (tiles // columns), side * columns


def _image(size: tuple[int, int], fields: dict[str, int]) -> dict[str, Any]:
    url = "data:image/png;base64," + b64encode(flat_png(*size)).decode()
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def _chat(model: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    text = {"type": "text", "text": "What is this?"}
    return {
        "model": model,
        "messages": [{"role": "user", "content": [text, *parts]}],
        "max_tokens": 1,
        "temperature": 0,
    }
