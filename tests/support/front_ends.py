"""Tiny checkpoints of each family, without weights: LMDeploy's front ends read nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from tests.support.checkpoints import make_internvl2, make_internvl_hf, write_tokenizer
from tests.support.checkpoints_eva import make_cogvlm, make_glm4v
from tests.support.checkpoints_llava import make_llava

_WRITTEN: Final[dict[str, dict[str, Any]]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)


def _write(name: str, folder: Path) -> Path:
    """A folder of `front_ends.yaml` with the stand-in tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(_WRITTEN[name])
    write_tokenizer(folder, files.pop("tokens", ()))
    for file, values in files.items():
        path = folder / file
        there = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**there, **values}))
    return folder


#: By ``architectures[0]``: every family of docs/models.md that an engine of LMDeploy runs, and
#: LLaVA-NeXT. Phi-3-vision's processor and InternVLChatModel's config class are remote code.
CHECKPOINTS: Final[dict[str, Callable[[Path], Path]]] = {
    "InternVLChatModel": make_internvl2,
    "InternVLForConditionalGeneration": make_internvl_hf,
    **{name: partial(_write, name) for name in _WRITTEN if not name.startswith(".")},
    "LlavaForConditionalGeneration": make_llava,
    "LlavaNextForConditionalGeneration": lambda folder: make_llava(folder, "llava_next"),
    "CogVLMForCausalLM": make_cogvlm,
    "ChatGLMModel": make_glm4v,
}
