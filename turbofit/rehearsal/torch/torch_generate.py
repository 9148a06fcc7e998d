"""Drives Transformers in a rehearsal's child; the fallback server loads models the same way."""

from __future__ import annotations

import time
from typing import Any

from turbofit.model.loading import load_model, load_processor
from turbofit.rehearsal.notes import Notes
from turbofit.rehearsal.spec import LETTER, LONGEST, TOKEN, RehearsalCase, RehearsalRequest, Spec
from turbofit.rehearsal.torch.phase_recorder import Phases


def drive(spec: Spec, notes: Notes) -> None:
    """Load the checkpoint and drive all cases, one request at a time."""
    notes.begin = Phases(notes.folder).enter
    import torch

    settings = {"dtype": "auto", "attn_implementation": "sdpa", **spec.settings}
    notes.write(settings=settings)
    cuda: Any = torch.cuda
    cuda.init()
    notes.enter("load")
    model = load_model(spec.model_dir, **settings)
    processor = load_processor(spec.model_dir)
    notes.alive.append(model)
    notes.enter("ready")
    for case in spec.cases:
        _case(model, processor, case, notes)


def _case(model: Any, processor: Any, case: RehearsalCase, notes: Notes) -> None:
    """Run the one request of a case, and note how the case ended."""
    (request,) = case.requests
    inputs = _inputs(processor, model.config, request)
    notes.enter(f"case {case.name}")
    begun = time.monotonic()
    placed = {name: value.to(model.device) for name, value in inputs.items()}
    wanted = request.max_new_tokens
    out = model.generate(**placed, max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False)
    prompt = int(inputs["input_ids"].shape[1])
    status = "finished" if out.shape[1] > prompt else "none"
    notes.case(case.name, [prompt], begun, [status])


def _inputs(processor: Any, config: Any, request: RehearsalRequest) -> dict[str, Any]:
    """Return a request's inputs for the model: token ids, or a processed prompt with pictures."""
    import torch

    torch_: Any = torch
    if not request.sizes:
        text = config.get_text_config()
        longest = int(getattr(text, "max_position_embeddings", 4096)) - request.max_new_tokens
        length = longest if request.text_tokens == LONGEST else request.text_tokens
        ids = torch_.full((1, max(1, length)), TOKEN, dtype=torch_.long)
        return {"input_ids": ids, "attention_mask": torch_.ones_like(ids)}
    from PIL import Image

    pictures = [Image.new("RGB", size, (120, 80, 40)) for size in request.sizes]
    token = getattr(processor, "image_token", None) or "<image>"
    vocabulary = processor.tokenizer.get_vocab()
    around = ("<|vision_start|>", "<|vision_end|>") if token == "<|image_pad|>" else ("", "")
    if around[0] not in vocabulary:
        around = ("", "")
    prompt = (around[0] + token + around[1]) * len(pictures) + LETTER * request.text_tokens
    return dict(processor(text=[prompt], images=pictures, return_tensors="pt"))
