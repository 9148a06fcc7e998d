"""Transformers' model and processor of a checkpoint, as the account has them.

The server for Transformers loads them here, and so does its rehearsal; nobody else: torch is
imported.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Modules of Qwen2.5-Omni's thinker, and where they are from Transformers 5.21 on.
_MOVED: Final = {
    "audio_tower": "model.audio_tower",
    "visual": "model.visual",
    "model": "model.language_model",
}


def load_model(checkpoint: str, **settings: Any) -> Any:
    """The model of a folder or hub id, ready to generate; settings are ``from_pretrained``'s.

    Raises:
        OSError: the checkpoint cannot be read.
        ValueError: Transformers refuses it, or the device map.
    """
    library, config = _transformers(), _config(checkpoint)
    auto = library.AutoModelForImageTextToText if _sees(config) else library.AutoModelForCausalLM
    placed = settings.get("device_map")
    if isinstance(placed, dict) and config.model_type == "qwen2_5_omni_thinker":
        settings["device_map"] = names_here(placed)
    model = auto.from_pretrained(checkpoint, config=config, **settings)
    if model.generation_config.eos_token_id is None:  # as in Qwen2.5-Omni's files
        tokenizer = library.AutoTokenizer.from_pretrained(checkpoint)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    _only_last_logits(model)
    return model.eval()


def names_here(device_map: Mapping[str, int | str]) -> dict[str, int | str]:
    """A map of Qwen2.5-Omni's thinker, as `layout` names its modules, for this Transformers.

    Its own loader says nothing of names that are not there: all of it would land on the CPU.
    """
    moved = _MOVED if hasattr(_transformers(), "Qwen2_5OmniThinkerModel") else {}
    heads = {name: name.split(".", 1)[0] for name in device_map}
    return {
        f"{moved.get(head, head)}{name[len(head) :]}": device_map[name]
        for name, head in heads.items()
    }


def load_processor(checkpoint: str) -> Any:
    """Its processor; the tokenizer of a model that takes no images.

    Raises:
        OSError, ValueError: the checkpoint cannot be read, or Transformers knows none for it.
    """
    library = _transformers()
    tools = library.AutoProcessor if _sees(_config(checkpoint)) else library.AutoTokenizer
    return tools.from_pretrained(checkpoint)


def _transformers() -> Any:
    """The package, typed as anything: its auto classes promise no type."""
    import transformers

    return transformers


def _config(checkpoint: str) -> Any:
    """Its config; of a model that also speaks, that of the part which answers in text.

    No auto class of images has the whole, and the talker would take memory for nothing: its
    weights stay in the files.
    """
    whole = _transformers().AutoConfig.from_pretrained(checkpoint)
    return getattr(whole, "thinker_config", whole)


def _sees(config: Any) -> bool:
    return hasattr(config, "vision_config")


def _only_last_logits(model: Any) -> None:
    """Spare the logits of all tokens of a prompt but the last, which alone is asked for.

    Most classes take ``logits_to_keep`` for it. Where one does not (Qwen2.5-Omni's thinker), they
    would be a prompt's length times the vocabulary: 9.3 GiB at 32,764 tokens.
    """
    head = model.get_output_embeddings()
    if head is not None and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:], *inputs[1:]))
