"""The worst-case requests of a plan for each engine, named like the ledger's transient terms.

``vision_request``: one request with as many images as a request may have. ``vision_forward``:
images with as many vision units in one forward as the plan reserves memory for. ``text_prefill``:
one prompt as long as the plan promises. ``sampling``: a full batch with ``top_k=0``. An engine that
serves one request at a time has only ``vision_request`` and ``text_prefill``.
"""

from __future__ import annotations

from typing import Final

from msgspec import convert
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images import ImageRule
from turbofit.core.images.rule import DummyImage
from turbofit.core.model import Model
from turbofit.core.plan import EnginePlan, Plan
from turbofit.memory.account import vision_load_within
from turbofit.memory.engines import engine_of
from turbofit.memory.worst_images import Image, Text, pictures
from turbofit.rehearsal.spec import LONGEST, RehearsalCase, RehearsalRequest, Unit

_NEW: Final = 2  # tokens to generate: one forward of prefill, one of decoding
_NEW_ON_TORCH: Final = 4
#: New tokens with which the PyTorch engine samples all rows of a batch at once: when half of the
#: batch runs, the engine prefills the other half after 16 steps. Source:
#: lmdeploy pytorch/engine/inputs_maker.py::InputsMakerAsync.do_prefill_default #1d41ff
_NEW_OF_ALL: Final = 24
_TEXT: Final = 32  # tokens of text in a request with images: about as many as a chat template has
#: The most tokens that a chat template adds before a prompt, around each picture, and at the end.
_CHAT: Final = Text(before=33, around=8, after=_NEW_ON_TORCH + 1)


def turbomind_cases(plan: Plan, engine: EnginePlan) -> tuple[RehearsalCase, ...]:
    """Return the cases for TurboMind, which accepts images of any number of vision units."""
    rule, limits = plan.model.image_rule, plan.promise.limits
    longest = min(engine.settings.session_len, plan.promise.context) - _NEW
    if rule is None or limits.vision_unit is None:
        return _cases(plan, engine, [], [], max(1, longest), _NEW)

    def make(units: int, tokens: int) -> Image | None:
        units = min(units, rule.units_within(tokens)) // rule.unit_step * rule.unit_step
        return Image(units, rule.unit_tokens(units)) if units > 0 else None

    def request(units: list[int], text: int) -> RehearsalRequest:
        grids = convert([rule.grid(count) for count in units], tuple[Unit, ...])
        return RehearsalRequest(text, grids, max_new_tokens=_NEW, lead=1)

    vision_request = request([limits.units_per_image] * limits.images_per_request, _TEXT)
    text = Text(before=1, after=1 + _NEW)
    worst = engine_of(plan).worst_images(plan.promise, engine, make, text)
    images = [image.units for image in worst.images]
    vision_forward = [request(images, 2)] if images else []
    return _cases(plan, engine, [vision_request], vision_forward, max(1, longest), _NEW)


def torch_cases(plan: Plan, engine: EnginePlan) -> tuple[RehearsalCase, ...]:
    """Return the cases for an engine on torch; an engine on torch needs real pictures.

    Raises:
        UsageError: no picture has as many units as the plan pays for; see `rehearsed_size`.
    """
    limits, settings, rule = plan.promise.limits, engine.settings, limited(plan).image_rule
    batches, vision_request, vision_forward = plan.backend.of_lmdeploy, [], []
    if rule is not None and limits.vision_unit is not None and limits.images_per_request:
        size = plan.workload.image_size or rehearsed_size(rule, limits.image_limit)
        vision_request = [_pictures(_TEXT, [size] * limits.images_per_request)]
        if batches:
            account, make = engine_of(plan), pictures(rule, DummyImage(size, {}), with_fields=False)
            worst = account.worst_images(plan.promise, engine, make, _CHAT)
            sizes = [dummy.size for dummy in worst.dummies]
            bound = account.units_bound(rule, vision_load_within(limits), settings)
            # There is a second request if its pixels may arrive while a forward runs: the gateway
            # does not make this request wait, and one forward does not take the whole batch.
            batch = settings.max_batch_size * limits.units_per_request
            count = 2 if bound <= engine.units_per_forward < batch else 1
            # A prefix cache does not encode a picture twice, so each request has its own colour.
            numbers = range(1, count + 1) if settings.enable_prefix_caching else [None] * count
            vision_forward = [_pictures(1, sizes, number) for number in numbers] if sizes else []
    longest = LONGEST if batches else settings.session_len - _NEW_ON_TORCH
    return _cases(plan, engine, vision_request, vision_forward, longest, _NEW_ON_TORCH)


def limited(plan: Plan) -> Model:
    """Return the plan's model with the planned image limit as its own limit.

    The model stays unchanged if its twin has no file that can state an image limit.
    """
    model, limit = plan.model, plan.promise.limits.image_limit
    carries = model.vision is not None and model.vision.kind in ("internvit", "moonvit")
    if model.image_rule is None or limit is None or not carries:
        return model
    return replace(model, image_rule=model.image_rule.with_limit(limit))


def rehearsed_size(rule: ImageRule, limit: int | None) -> tuple[int, int]:
    """Return (width, height), in pixels, of a picture with the most vision units under the limit.

    The picture is as square as possible.

    Raises:
        UsageError: the limit is above the checkpoint's own limit, so no picture reaches the limit.
    """
    if limit is not None and limit > rule.checkpoint_limit:
        raise UsageError(
            f"{rule.limit_option} {limit} is above the checkpoint's own {rule.checkpoint_limit}",
            hint=f"lower it to {rule.checkpoint_limit} at most: a rehearsal sends only pictures"
            " that the checkpoint's own limit allows",
        )
    return rule.worst_size(limit)


def _pictures(
    letters: int, sizes: list[tuple[int, int]], number: int | None = None
) -> RehearsalRequest:
    return RehearsalRequest(
        letters, sizes=tuple(sizes), max_new_tokens=_NEW_ON_TORCH, images=number
    )


def _cases(
    plan: Plan,
    engine: EnginePlan,
    vision_request: list[RehearsalRequest],
    vision_forward: list[RehearsalRequest],
    longest: int,
    new: int,
) -> tuple[RehearsalCase, ...]:
    """Return the cases that have requests; each request generates ``new`` tokens.

    ``longest`` is the number of tokens in the longest prompt.
    """
    cases = {"vision_request": vision_request, "vision_forward": vision_forward}
    cases["text_prefill"] = [RehearsalRequest(longest, max_new_tokens=new)]
    if plan.backend.of_lmdeploy:
        most = _NEW_OF_ALL if plan.backend.on_torch else new
        row = RehearsalRequest(16, max_new_tokens=most, top_k=0)
        cases["sampling"] = [row] * engine.settings.max_batch_size
    return tuple(RehearsalCase(name, tuple(some)) for name, some in cases.items() if some)
