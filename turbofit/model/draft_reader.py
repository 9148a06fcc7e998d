"""Reads what drafts for a model: a checkpoint of its own, or further layers of the model's (MTP).

What is refused LMDeploy does not run, or turbofit has no account of.
Source: lmdeploy pytorch/config.py::SpecDecodeConfig.from_config #765fbb
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from msgspec.structs import replace

from turbofit.core.draft import Draft, SpeculativeAlgorithm
from turbofit.core.errors import UsageError
from turbofit.core.model import Model, TextDims
from turbofit.core.units import HALF
from turbofit.core.version import REFERENCE
from turbofit.model.checkpoint import Files, read_section
from turbofit.model.config import Section
from turbofit.model.families.text import read_text
from turbofit.model.folder import FolderFiles
from turbofit.model.parameters import draft_elements
from turbofit.model.presets import find_preset, load_preset
from turbofit.model.source import checkpoint_files

_LLAMA: Final = "LlamaForCausalLM"
#: Models whose own checkpoint has drafting layers, and the config key that counts them.
_MTP: Final[Mapping[str, Mapping[str, str]]] = {
    "deepseek_mtp": {
        "DeepseekV3ForCausalLM": "num_nextn_predict_layers",
        "Glm4MoeForCausalLM": "num_nextn_predict_layers",
        "Glm4MoeLiteForCausalLM": "num_nextn_predict_layers",
    },
    "qwen3_5_mtp": {
        "Qwen3_5ForConditionalGeneration": "mtp_num_hidden_layers",
        "Qwen3_5MoeForConditionalGeneration": "mtp_num_hidden_layers",
    },
}
_NO_ACCOUNT: Final = {
    "hy3_mtp": "Hy3, the only model that it drafts for, has no account",
    "dflash": "a DFlash draft proposes a block at once, from keys and values of its target",
}
#: torch's own format, whose size alone is read.
_TORCH_FILE: Final = "pytorch_model.bin"


def requested_draft(
    model: Model, method: SpeculativeAlgorithm | None, name: str | None, tokens: int | None
) -> Draft:
    """What a person asks to draft for a model.

    Raises:
        UsageError: nobody says how, or as :func:`read_draft`.
    """
    if method is None:
        option = "draft-model" if name is not None else "num-draft-tokens"
        raise UsageError(
            f"--speculative-{option} says how to draft, and nothing is asked to",
            hint="give --speculative-algorithm too",
        )
    return read_draft(model, method, name, tokens or 1)


def read_draft(model: Model, method: SpeculativeAlgorithm, name: str | None, tokens: int) -> Draft:
    """What drafts for a model.

    Args:
        model: the target.
        method: how.
        name: the draft's folder or hub id; None where the target's own checkpoint holds it.
        tokens: that it proposes in a step.

    Raises:
        UsageError: LMDeploy does not run it, turbofit has no account of it, or it is not there.
    """
    if method in _NO_ACCOUNT:
        raise UsageError(
            f"turbofit has no account of --speculative-algorithm {method}: {_NO_ACCOUNT[method]}",
            hint="plan without it, or pass it after -- with --unplanned",
        )
    if method in _MTP:
        return _layers_of_target(model, method, name, tokens)
    if model.architecture != _LLAMA:
        raise UsageError(
            f"LMDeploy {REFERENCE} drafts with {method} for {_LLAMA}, not for {model.architecture}",
            hint=_hint_for(model),
        )
    if name is None:
        raise UsageError(
            f"--speculative-algorithm {method} has its draft in a checkpoint of its own",
            hint="name its folder or hub id: --speculative-draft-model yuhuili/"
            "EAGLE3-LLaMA3.1-Instruct-8B",
        )
    return _checkpoint(model, method, name, tokens)


def _hint_for(model: Model) -> str:
    methods = [method for method, targets in _MTP.items() if model.architecture in targets]
    if not methods:
        return "plan without a draft"
    return f"--speculative-algorithm {methods[0]} drafts for it"


def _layers_of_target(
    model: Model, method: SpeculativeAlgorithm, name: str | None, tokens: int
) -> Draft:
    key = _MTP[method].get(model.architecture)
    if key is None:
        raise UsageError(
            f"LMDeploy {REFERENCE} drafts with {method} for {', '.join(_MTP[method])}, not for"
            f" {model.architecture}",
            hint=_hint_for(model),
        )
    quantization = model.quantization
    if quantization is not None and quantization.method != "fp8":
        raise UsageError(
            f"turbofit has no account of a draft in {quantization.method} weights: most"
            f" checkpoints leave its layers at 16 bits, which LMDeploy {REFERENCE} builds packed",
            hint="take the checkpoint of 16 or 8 bits, or plan without a draft",
        )
    layers = _layers(model, name, key)
    if not layers:
        raise UsageError(
            f"{name or model.name} holds no layers that draft: {key} is absent or 0",
            hint="plan without --speculative-algorithm",
        )
    # The target with so many layers, each with attention, and with experts where the last has.
    moe = replace(model.text.moe, layers=layers) if model.text.moe else None
    text = replace(model.text, layers=layers, delta=None, moe=moe)
    return Draft(
        method=method,
        num_speculative_tokens=tokens,
        model=name or "",
        text=text,
        vocab=text.vocab,
        embeddings=method == "deepseek_mtp",
    )


def _layers(model: Model, name: str | None, key: str) -> int:
    if name is None and model.source.kind == "preset":
        return load_preset(model.source.where).draft_layers or 0
    preset = find_preset(name) if name else None
    if preset is not None and not os.path.isdir(str(name)):
        return load_preset(preset).draft_layers or 0
    where = name or model.source.checkpoint or model.hub_id or model.source.where
    config = _config(checkpoint_files(where, model.revision if name is None else None), where)
    inner = config.section("text_config") or config
    return inner.integer(key, 0, low=0, high=64)


def _config(files: Files, where: str) -> Section:
    config = read_section(files, "config.json", f"{where}: config.json")
    if config is None:
        raise UsageError(f"{where} has no config.json", hint="name the draft's folder or hub id")
    return config


def _checkpoint(model: Model, method: SpeculativeAlgorithm, name: str, tokens: int) -> Draft:
    path = os.path.abspath(os.path.expanduser(name))
    name = path if os.path.isdir(path) else name
    files = checkpoint_files(name)
    config = _config(files, name)
    architectures = config.strings("architectures")
    if architectures[:1] != (_LLAMA,):
        raise UsageError(
            f"{name} is a draft of {', '.join(architectures) or 'no named architecture'}, which"
            f" LMDeploy {REFERENCE} does not take for {method}: it takes {_LLAMA}",
            hint="name a draft whose config.json says so",
        )
    text = read_text(config, _LLAMA)
    width = config.integer("target_hidden_size", text.hidden) if method == "eagle3" else text.hidden
    if (width, text.vocab) != (model.text.hidden, model.text.vocab):
        raise UsageError(
            f"{name} drafts for a model of {width} channels and {text.vocab} tokens;"
            f" {model.name} has {model.text.hidden} and {model.text.vocab}",
            hint="name a draft of this model",
        )
    vocab = text.vocab
    if method == "eagle3":
        vocab = config.integer("draft_vocab_size")
        _check_eagle3(model, text, name)
    return Draft(
        method=method,
        num_speculative_tokens=tokens,
        model=name,
        text=text,
        vocab=vocab,
        embeddings=method == "eagle" or _has_embeddings(files, text, vocab, width),
    )


def _check_eagle3(model: Model, text: TextDims, name: str) -> None:
    if text.layers != 1:
        raise UsageError(
            f"{name} has {text.layers} layers: LMDeploy {REFERENCE} takes Eagle3 drafts of one",
            hint="name a draft of one layer",
        )
    layers = model.text.layers
    if not 2 < layers // 2 < layers - 3:
        raise UsageError(
            f"Eagle3 reads three layers of its target, and {model.name} has {layers}",
            hint="plan without a draft",
        )


def _has_embeddings(files: Files, text: TextDims, vocab: int, width: int) -> bool:
    """Whether an Eagle3 draft brings embeddings, which are its target's own where it does not.

    Of files in torch's own format the size tells; where that is not known either, it does. Over.
    """
    tensors = files.weights().tensors
    if tensors is not None:
        return any("embed_tokens" in name for name in tensors)
    size = files.size(_TORCH_FILE) if isinstance(files, FolderFiles) else None
    alone = draft_elements("eagle3", text, vocab, width) * HALF
    return size is None or size > alone + text.vocab * text.hidden * HALF // 2
