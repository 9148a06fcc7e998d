"""What vLLM is sent: the same requests as everybody, as pictures."""

from __future__ import annotations

from typing import Any, Final

from bench.peers.workload import LONG, QUEUED, ROWS, meeting_units
from turbofit.core.model import Model

_QWEN: Final = "<|vision_start|><|image_pad|><|vision_end|>"
#: What stands for a picture in a prompt, by the model's class.
_MARKERS: Final = {
    "InternVLChatModel": "<image>\n",
    "InternVLForConditionalGeneration": "<IMG_CONTEXT>\n",
    "Qwen2VLForConditionalGeneration": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "Qwen3VLForConditionalGeneration": _QWEN,
}


def cases_of(model: Model) -> list[dict[str, Any]]:
    """One worst image, ``QUEUED`` of which two have room in a context, a long prompt, sampling."""
    rule, cases = model.image_rule, list[dict[str, Any]]()
    if rule is not None:
        prompt = {"prompt": _MARKERS[model.architecture]}
        one = less = rule.worst_size()
        if not rule.few_limits:
            meet = meeting_units(rule, model.text.max_position_embeddings)
            less = rule.worst_size(meet // rule.unit_step * rule.limit_step)
        cases.append({"name": "one image", "count": 1, "size": one} | prompt)
        cases.append({"name": f"{QUEUED} images queued", "count": QUEUED, "size": less} | prompt)
    cases.append({"name": "long prompt", "count": 1, "tokens": LONG})
    cases.append({"name": "sampling", "count": ROWS, "tokens": 16, "sampled": True})
    return cases
