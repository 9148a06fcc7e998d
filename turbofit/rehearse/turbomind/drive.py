"""Turns a rehearsal's requests into TurboMind's own, and pushes them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from turbofit.rehearse.turbomind.spec import RehearsalRequest, Unit


@dataclass
class Pending:
    """A request that was pushed.

    Attributes:
        tokens: prompt tokens, image tokens included.
        done: set when the engine finished or refused it.
        status: the engine's status code (7 finished, 11 out of memory, 6 too long).
        kept: what must stay alive until it is done.
    """

    tokens: int
    done: threading.Event = field(default_factory=threading.Event)
    status: int = -1
    kept: list[Any] = field(default_factory=list)


@lru_cache(maxsize=64)
def _pixels(shape: tuple[int, ...], dtype: str) -> Any:
    """Pixels without values, shared by all images of a shape; untouched memory costs no RAM."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype))


def _image(engine: Any, unit: Unit, offset: int, number: int) -> tuple[dict[str, Any], int]:
    """An image as LMDeploy's preprocessor would hand it over, without values, and its tokens."""
    vision = engine.source_model.vision_model
    dtype = str(engine.engine_config.dtype)
    name = number.to_bytes(32, "big")
    if isinstance(unit, int):
        shape = (unit, vision._channels, vision._image_h, vision._image_w)
        tokens = unit * vision._image_seq_length
        return {
            "pixel_values": _pixels(shape, dtype),
            "offset": offset,
            "image_tokens": tokens,
            "fingerprint": name,
        }, tokens
    t, h, w = unit
    tokens = t * h * w // vision._vis_spatial_merge**2
    return {
        "modality": "image",
        "pixel_values": _pixels((t * h * w, vision._patch_in_dim), dtype),
        "image_grid_thw": [t, h, w],
        "offset": (offset, offset + tokens),
        "image_tokens": tokens,
        "fingerprint": name,
    }, tokens


_numbers = iter(range(1, 2**31))
#: Images that requests share are numbered above all others.
_SHARED = 2**32


def _number(request: RehearsalRequest, place: int) -> int:
    """What tells an image from others, as LMDeploy's hash of its pixels does."""
    return next(_numbers) if request.images is None else _SHARED * (1 + request.images) + place


def submit(engine: Any, session: int, request: RehearsalRequest) -> Pending:
    """Pushes one request into the engine's queue; returns at once."""
    import torch
    from lmdeploy.messages import GenerationConfig
    from lmdeploy.turbomind import _tm

    lead = request.text_tokens // 2 if request.lead is None else request.lead
    images, offset = [], lead
    for place, unit in enumerate(request.units):
        image, tokens = _image(engine, unit, offset, _number(request, place))
        images.append(image)
        offset += tokens
    total = offset + request.text_tokens - lead
    pending = Pending(tokens=total)
    ids = torch.ones(total, dtype=torch.int32)
    ids[offset:] = 2 + session % 999  # no two questions about a shared image are alike
    inputs = _tm.TensorMap()
    inputs["input_ids"] = _tm.from_dlpack(ids)
    generation = GenerationConfig(
        max_new_tokens=request.max_new_tokens,
        top_k=request.top_k,
        output_logits=request.output_logits,
        ignore_eos=True,
        do_sample=True,
    )
    instance = engine.create_instance()
    config = instance._get_generation_config(generation)
    vision = engine.mm_input_converter(images) if images else None
    state: list[Any] = []

    def progressed() -> None:
        if not state:
            return
        seen = state[0].consume()
        if seen is not None and seen.status != 0:
            pending.status = seen.status
            pending.done.set()

    outputs, shared, metrics = instance.model_inst.forward(
        inputs, vision, _tm.SessionParam(id=session + 1, step=0), config, False, True, progressed
    )
    state.append(shared)
    pending.kept += [ids, images, inputs, vision, outputs, metrics, instance, progressed]
    return pending
