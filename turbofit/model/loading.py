"""Loads Transformers' model and processor of a checkpoint, as the account describes them.

This module imports torch, so only the server for Transformers and its rehearsal import it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

#: Modules of Qwen2.5-Omni's thinker, and their names since Transformers 5.21.
_MOVED: Final = {
    "audio_tower": "model.audio_tower",
    "visual": "model.visual",
    "model": "model.language_model",
}


def load_model(checkpoint: str, **settings: Any) -> Any:
    """Load a model from a folder or hub id, with arguments for ``from_pretrained``.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: Transformers refuses the checkpoint, or the device map.
    """
    library, config = _transformers(), _config(checkpoint)
    auto = (
        library.AutoModelForImageTextToText
        if _takes_images(config)
        else library.AutoModelForCausalLM
    )
    placed = settings.get("device_map")
    if isinstance(placed, dict) and config.model_type == "qwen2_5_omni_thinker":
        settings["device_map"] = installed_names(placed)
    model = auto.from_pretrained(checkpoint, config=config, **settings)
    if model.generation_config.eos_token_id is None:  # the files of Qwen2.5-Omni have no end token
        tokenizer = library.AutoTokenizer.from_pretrained(checkpoint)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    head = model.get_output_embeddings()
    # Only the last token's logits are needed; without this, the model computes those of all tokens.
    if head is not None and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:], *inputs[1:]))
    return model.eval()


def installed_names(device_map: Mapping[str, int | str]) -> dict[str, int | str]:
    """Convert a device map of Qwen2.5-Omni's thinker to the installed Transformers' module names.

    The device maps of `layout` have the older names. Transformers ignores unknown names, and would
    place everything on the CPU.
    """
    moved = _MOVED if hasattr(_transformers(), "Qwen2_5OmniThinkerModel") else {}
    heads = {name: name.split(".", 1)[0] for name in device_map}
    return {
        f"{moved.get(head, head)}{name[len(head) :]}": device_map[name]
        for name, head in heads.items()
    }


def load_processor(checkpoint: str) -> Any:
    """Load the checkpoint's processor, or the tokenizer if the model takes no images.

    Raises:
        OSError, ValueError: the checkpoint cannot be read, or Transformers has no processor for it.
    """
    library = _transformers()
    tools = library.AutoProcessor if _takes_images(_config(checkpoint)) else library.AutoTokenizer
    return tools.from_pretrained(checkpoint)


def _transformers() -> Any:
    """Import Transformers as Any, since its auto classes have no useful types."""
    import transformers

    return transformers


def _config(checkpoint: str) -> Any:
    """Read a checkpoint's config; for a model that also speaks, the config of its thinker.

    No auto class for images covers the whole model, and the part that speaks wastes memory.
    """
    whole = _transformers().AutoConfig.from_pretrained(checkpoint)
    return getattr(whole, "thinker_config", whole)


def _takes_images(config: Any) -> bool:
    return hasattr(config, "vision_config")
