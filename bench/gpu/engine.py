"""Stage b, in a process of its own: a plan on the GPU, its worst image, and marks for NVML.

``python -m bench.gpu.engine MODEL FOLDER [KEY=VALUE…]``: makes a checkpoint of the preset's shapes
in FOLDER (weights are holes: zeros), plans on the machine as it is, starts ``turbofit.pipeline``,
and sends the largest image that the plan admits, then a batch of them. The plan goes to
``FOLDER/plan.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import turbofit
from bench.gpu.constants import mark
from turbofit.core.plan import Plan
from turbofit.core.struct import to_json
from turbofit.rehearse.checkpoint.twin import checkpoint_for

__all__ = ["main"]


def worst_image(plan: Plan) -> Any:
    """The picture of which the plan's limits make most."""
    from PIL import Image

    from turbofit.launch.engine import image

    found = image.worst_image(plan)
    assert found is not None
    return Image.new("RGB", found.size)


def main(words: list[str]) -> int:
    """Plan, start, ask."""
    model, folder = words[0], Path(words[1])
    options = dict(word.split("=", 1) for word in words[2:])
    settings: dict[str, Any] = {name: json.loads(value) for name, value in options.items()}
    from turbofit.model.source import resolve_model

    source = resolve_model(model)
    checkpoint = folder / source.name
    if not checkpoint.exists():
        checkpoint_for(source, checkpoint)
    mark("begin")
    pipe = turbofit.pipeline(str(checkpoint), **settings)
    plan: Plan = pipe.plan
    (folder / "plan.json").write_text(to_json(plan))
    mark("ready", tokens=plan.kv.tokens, ratio=plan.settings.cache_max_entry_count)
    if plan.limits.vision_unit is None:
        prompt: Any = "word " * 512
    else:
        prompt = ("what is this?", worst_image(plan))
    keywords = {"max_new_tokens": 4}
    one = pipe(prompt, **keywords)
    mark("one_image", prompt=one.input_token_len, said=str(one.finish_reason))
    many = pipe([prompt] * plan.settings.max_batch_size, **keywords)
    mark("many_images", answered=sum(got.finish_reason != "error" for got in many))
    pipe.close()
    mark("end")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
