"""Transformers in a rehearsal's child: loads the model as the fallback does, then generates."""

from __future__ import annotations

import time
from typing import Any, Final

from turbofit.memory.transformers.components import load_model, load_processor
from turbofit.rehearse.torch.torch_notes import NotesReport
from turbofit.rehearse.torch.torch_spec import LONGEST, TorchCase, TorchRequest, TorchSpec

__all__ = ["run_transformers"]

_TOKEN: Final = 5


def run_transformers(spec: TorchSpec, report: NotesReport) -> None:
    """Loads the checkpoint and drives all cases, one request at a time."""
    import torch
    import transformers

    library: Any = transformers
    report.write(engine_version=library.__version__)
    settings = {"dtype": "auto", "attn_implementation": "sdpa", **spec.settings}
    report.write(settings=settings)
    cuda: Any = torch.cuda
    cuda.init()
    report.enter("load")
    model = load_model(str(spec.model_dir), **settings)
    placed = getattr(model, "hf_device_map", None) or {"": str(model.device)}
    report.write(device_map={key: str(value) for key, value in placed.items()})
    processor = load_processor(str(spec.model_dir))
    report.enter("ready")
    for case in spec.cases:
        report.data["cases"].append(_case(model, processor, case, report))
        report.write()


def _case(model: Any, processor: Any, case: TorchCase, report: NotesReport) -> dict[str, Any]:
    (request,) = case.requests
    inputs = _inputs(processor, model.config, request)
    report.enter(f"case {case.name}")
    begun = time.monotonic()
    placed = {name: value.to(model.device) for name, value in inputs.items()}
    wanted = request.max_new_tokens
    out = model.generate(**placed, max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False)
    prompt = int(inputs["input_ids"].shape[1])
    return {
        "name": case.name,
        "requests": 1,
        "images": [list(size) for size in request.images],
        "prompt_tokens": prompt,
        "seconds": round(time.monotonic() - begun, 3),
        "statuses": {"finished" if out.shape[1] > prompt else "none": 1},
        "words": "",
    }


def _inputs(processor: Any, config: Any, request: TorchRequest) -> dict[str, Any]:
    import torch

    torch_: Any = torch
    if not request.images:
        text = config.get_text_config()
        longest = int(getattr(text, "max_position_embeddings", 4096)) - request.max_new_tokens
        length = longest if request.text_tokens == LONGEST else request.text_tokens
        ids = torch_.full((1, max(1, length)), _TOKEN, dtype=torch_.long)
        return {"input_ids": ids, "attention_mask": torch_.ones_like(ids)}
    from PIL import Image

    pictures = [Image.new("RGB", size, (120, 80, 40)) for size in request.images]
    token = getattr(processor, "image_token", None) or "<image>"
    vocabulary = processor.tokenizer.get_vocab()
    around = ("<|vision_start|>", "<|vision_end|>") if token == "<|image_pad|>" else ("", "")
    if around[0] not in vocabulary:
        around = ("", "")
    prompt = (around[0] + token + around[1]) * len(pictures) + "a" * request.text_tokens
    return dict(processor(text=[prompt], images=pictures, return_tensors="pt"))
