"""What a pair is asked: a checkpoint of each family, and what turbofit's rule says of one image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bench.compatibility.checkpoints import CHECKPOINTS
from turbofit.model.families.engines import TURBOMIND_VISION
from turbofit.model.source import resolve_model

#: Small, since LLaVA-1.5 under Transformers 5 takes each column for a channel; three to two, since
#: InternVL makes six tiles and a thumbnail of that.
_SIZE: Final = (90, 60)
#: Placeholders of the front ends that are given a prompt.
_TOKENS: Final = {"Glm4vForConditionalGeneration": "<|image|>"}
_CHAT: Final = "InternVLChatModel"
_TOKEN: Final = "<|image_pad|>"
_INTERNLM2: Final = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False,
    "pad_token_id": 2, "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "vocab_size": 92553,
}  # fmt: skip


def make_jobs(folder: Path, codes: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A job for each family; for InternVL's chat models one for each code that they publish.

    Args:
        folder: where the checkpoints are written.
        codes: folders with InternVL's own Python files, by a name for each.
    """
    jobs = []
    for name, make in CHECKPOINTS.items():
        if name != _CHAT:  # nothing reads its config without its code
            made = make(folder / name)
            _drop_tokenizer_code(made)
            jobs.append(_job(name, made, trust=False))
    for name, code in codes.items():
        made = CHECKPOINTS[_CHAT](folder / name)
        jobs.append(_job(f"{_CHAT}+{name}", _with_code(made, code), trust=True))
    return jobs


def _job(name: str, folder: Path, *, trust: bool) -> dict[str, Any]:
    for file in folder.glob("*.safetensors*"):  # no front end reads them
        file.unlink()
    model = resolve_model(str(folder))
    rule, vision = model.image_rule, model.vision
    assert rule is not None
    assert vision is not None
    # The towers' own values of one unit: three colours, of a patch at two moments.
    unit = 3 * 2 * vision.patch_size**2
    if rule.unit_name == "tile":
        unit = 3 * (vision.image_size or 0) ** 2
    architecture = name.partition("+")[0]
    native = architecture in TURBOMIND_VISION
    return {
        "name": name, "folder": str(folder), "architecture": architecture, "trust": trust,
        "engines": ["turbomind", "pytorch"] if native else ["pytorch"], "size": _SIZE,
        "tokens": rule.tokens(*_SIZE), "token": _TOKENS.get(architecture, _TOKEN),
        "elements": rule.units(*_SIZE) * unit,
    }  # fmt: skip


def _drop_tokenizer_code(folder: Path) -> None:
    """A stand-in tokenizer has no code of its own, whatever the published checkpoint has."""
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("auto_map", None)
    path.write_text(json.dumps(values))


def _with_code(folder: Path, code: Path) -> Path:
    """InternVL with a config class of its own, and InternLM2's tokenizer where it is there too."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    for path in code.iterdir():
        shutil.copy(path, folder)
    if (folder / "tokenizer.model").exists():
        (folder / "tokenizer.json").unlink()
        config["llm_config"] |= _INTERNLM2
    (folder / "config.json").write_text(json.dumps(config))
    return folder
