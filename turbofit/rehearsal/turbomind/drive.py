"""Drives TurboMind in a rehearsal's child: starts the engine, and submits requests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from turbofit.rehearsal.notes import NOT_FINISHED, Notes
from turbofit.rehearsal.pretend.libraries import LibraryAccount
from turbofit.rehearsal.run import LIMITS_WHILE_ACTIVE, InactivityTimer
from turbofit.rehearsal.spec import RehearsalCase, RehearsalRequest, Spec, Unit

_STATUS: Final = {
    -1: NOT_FINISHED,
    0: "ok",
    1: "invalid",
    2: "conflict",
    5: "failed",
    6: "too_long",
    7: "finished",
    8: "cancelled",
    9: "inconsistent",
    10: "no_queue",
    11: "out_of_memory",
}
#: Each image gets a number of its own, in place of LMDeploy's hash of the pixels.
_numbers = iter(range(1, 2**31))


def drive(spec: Spec, notes: Notes) -> None:
    """Start the engine and drive the cases in order; stop if the engine does not survive a case."""
    account = LibraryAccount(Path(os.environ["TURBOFIT_PRETEND_LIBRARIES"]))
    account.mark("import")
    engine = _start(spec, account, notes)
    notes.alive.append(engine)
    for case in spec.cases:
        notes.enter(f"case {case.name}")
        if not _run_case(engine, case, account, spec, notes):
            break


def _start(spec: Spec, account: LibraryAccount, notes: Notes) -> Any:
    """Start TurboMind, and return its engine."""
    import torch  # noqa: F401 - the phase `torch` measures this import

    from turbofit.rehearsal.turbomind.hooks import install

    notes.enter("torch")
    from lmdeploy.messages import TurbomindEngineConfig

    config = TurbomindEngineConfig(**spec.settings)
    install(
        spec.machine,
        account,
        first_device=(config.devices or [0])[0],
        ready=lambda engine: notes.started(engine.engine_config),
    )
    notes.enter("import")
    from lmdeploy.turbomind.turbomind import TurboMind

    return TurboMind.from_pretrained(spec.model_dir, engine_config=config)


def _quiet(account: LibraryAccount, seconds: float = 0.03, limit: float = 5.0) -> bool:
    """Wait until no thread calls CUDA for ``seconds``; return False after ``limit`` seconds."""
    timer = InactivityTimer(account.calls)
    while timer.inactive() < seconds:
        if timer.elapsed() > limit:
            return False
        time.sleep(0.005)
    return True


def _wait(pending: Sequence[Any], account: LibraryAccount, seconds: float) -> None:
    """Wait until all requests have ended, or the engine makes no CUDA call for ``seconds``.

    If the engine keeps making calls, the wait ends after `LIMITS_WHILE_ACTIVE` times ``seconds``.
    """
    timer = InactivityTimer(account.calls)
    longest = LIMITS_WHILE_ACTIVE * seconds
    for request in pending:
        while not request.done.wait(0.2):
            if timer.inactive() > seconds or timer.elapsed() > longest:
                return


def _run_case(
    engine: Any, case: RehearsalCase, account: LibraryAccount, spec: Spec, notes: Notes
) -> bool:
    """Put all requests of a case into the engine's queue at once, and wait for their end.

    Return whether the engine can take another case.
    """
    if not _quiet(account) or not account.freeze():
        raise RuntimeError("the engine's threads did not stop")
    try:
        pending = [submit(engine, i, request) for i, request in enumerate(case.requests)]
        account.mark(f"case {case.name}")
    finally:
        account.thaw()
    begun = time.monotonic()
    _wait(pending, account, spec.case_seconds)
    _quiet(account)
    account.mark(f"after {case.name}")
    statuses = [_STATUS.get(request.status, str(request.status)) for request in pending]
    tokens = [request.tokens for request in pending]
    return notes.case(case.name, tokens, begun, statuses)


@dataclass
class Pending:
    """A submitted request, with its prompt's number of tokens, and objects that the engine uses."""

    tokens: int
    done: threading.Event = field(default_factory=threading.Event)
    status: int = -1
    kept: list[Any] = field(default_factory=list)


@lru_cache(maxsize=64)
def _pixels(shape: tuple[int, ...], dtype: str) -> Any:
    """Return an uninitialised tensor for the pixels of images; unwritten, it takes no RAM."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype))


def _image(engine: Any, unit: Unit, offset: int, number: int) -> dict[str, Any]:
    """Return an image in the form of LMDeploy's preprocessor, with uninitialised pixels.

    ``unit`` is the image's number of tiles, or its grid in patches. ``offset`` is the place of its
    first token in the prompt. ``number`` distinguishes it from all other images.
    """
    vision = engine.source_model.vision_model
    dtype = str(engine.engine_config.dtype)
    image: dict[str, Any] = {"offset": offset, "fingerprint": number.to_bytes(32, "big")}
    if isinstance(unit, int):
        shape: tuple[int, ...] = (unit, vision._channels, vision._image_h, vision._image_w)
        tokens = unit * vision._image_seq_length
    else:
        t, h, w = unit
        shape = (t * h * w, vision._patch_in_dim)
        tokens = t * h * w // vision._vis_spatial_merge**2
        image |= {"modality": "image", "image_grid_thw": [t, h, w]}
        image["offset"] = (offset, offset + tokens)
    return image | {"image_tokens": tokens, "pixel_values": _pixels(shape, dtype)}


def submit(engine: Any, session: int, request: RehearsalRequest) -> Pending:
    """Push one request into the engine's queue; return without waiting for its answer."""
    import torch
    from lmdeploy.messages import GenerationConfig
    from lmdeploy.turbomind.turbomind import _tm

    lead = request.text_tokens // 2 if request.lead is None else request.lead
    images, offset = [], lead
    for unit in request.units:
        images.append(_image(engine, unit, offset, next(_numbers)))
        offset += images[-1]["image_tokens"]
    total = offset + request.text_tokens - lead
    pending = Pending(tokens=total)
    ids = torch.ones(total, dtype=torch.int32)
    ids[offset:] = 2 + session % 999  # requests of a case differ, so no prefix cache joins them
    inputs = _tm.TensorMap()
    inputs["input_ids"] = _tm.from_dlpack(ids)
    generation = GenerationConfig(
        max_new_tokens=request.max_new_tokens,
        top_k=request.top_k,
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
        update = state[0].consume()
        if update is not None and update.status != 0:
            pending.status = update.status
            pending.done.set()

    outputs, shared, metrics = instance.model_inst.forward(
        inputs, vision, _tm.SessionParam(id=session + 1, step=0), config, False, True, progressed
    )
    state.append(shared)
    pending.kept += [ids, images, inputs, vision, outputs, metrics, instance, progressed]
    return pending
