"""Reads a draft that LMDeploy's PyTorch engine loads beside a model for speculative decoding.

A draft is a checkpoint of its own (EAGLE), or layers of the model's own checkpoint (MTP).
The engine's classes check little. A tensor that the file lacks stays unfilled, and a tensor that
the class does not have ends the engine's start. This module refuses a file with either fault. Only
the config and headers are read.
"""

from __future__ import annotations

import os
from math import prod
from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Draft, Model
from turbofit.core.version import REFERENCE
from turbofit.model.adapters import lora_modules
from turbofit.model.checkpoint import read_section
from turbofit.model.config import Section
from turbofit.model.families.text import read_text
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.files import located

#: The architecture that a base and its draft must have. Source:
#: lmdeploy configurations/llama.py::LlamaModelConfigBuilder.build #815ffa
_LLAMA: Final = "LlamaForCausalLM"
_KIMI: Final = "KimiK2ForCausalLM"
#: Algorithms that LMDeploy has and turbofit does not plan, with the reason.
_UNPLANNED: Final = {
    "dflash": "turbofit has no account of drafts that propose a block at once",
    "hy3_mtp": "turbofit has no account of Hy3",
}
#: The language models whose checkpoints have a draft of an algorithm, with a name of the draft's
#: tensors; ``{}`` is the number of layers. Source:
#: lmdeploy engine/config_builder.py `'deepseek_mtp', 'qwen3_5_mtp', 'hy3_mtp'`
#: lmdeploy configurations/glm4.py `spec_method == 'deepseek_mtp'`
_OWN: Final = {
    "qwen3_5_mtp": {
        "Qwen3_5ForCausalLM": "mtp.fc.weight",
        "Qwen3_5MoeForCausalLM": "mtp.fc.weight",
    },
    "deepseek_mtp": dict.fromkeys(
        ("Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "DeepseekV3ForCausalLM"),
        "model.layers.{}.eh_proj.weight",
    ),
}
_WITHOUT: Final = "leave the draft out: answers are the same"
#: The most tokens that a draft proposes in a step. For each answer, the engine reserves cache
#: for 16 x (1 + this number) tokens: at most two blocks.
#: Source: lmdeploy ar_spec/engine.py::ARSpecEngineStrategy.get_prealloc_size #7a6ed7
_MOST_TOKENS: Final = 6
EAGLE3: Final = "eagle3"
#: The number of layers whose states EAGLE-3 reads: the third, the middle one, and the third from
#: the end.
STATES: Final = 3
#: With fewer layers, the middle one is also the third, or the third from the end.
_LEAST_LAYERS: Final = 7
_HINT: Final = "name the draft that was trained for this model"


def draft_tensors(draft: Draft) -> dict[str, tuple[int, ...]]:
    """Return the shape of each 16-bit tensor that LMDeploy's class loads, by the tensor's name."""
    text, is_eagle3 = draft.text, draft.algorithm == EAGLE3
    # The layer fc joins a token's states in EAGLE-3, else the token's embedding and its state.
    norm, sources = (text.hidden,), STATES if is_eagle3 else 2
    named: dict[str, tuple[int, ...]] = {"fc.weight": (text.hidden, sources * text.hidden)}
    if draft.embeds:
        named["embed_tokens.weight"] = (text.vocab, text.hidden)
    if is_eagle3:
        named["lm_head.weight"] = (draft.head_rows, text.hidden)
        named["norm.weight"] = named["midlayer.hidden_norm.weight"] = norm
    for layer in range(text.layers):
        prefix = "midlayer" if is_eagle3 else f"layers.{layer}"
        named[f"{prefix}.post_attention_layernorm.weight"] = norm
        if is_eagle3 or layer:  # EAGLE's first layer has no norm before its attention
            named[f"{prefix}.input_layernorm.weight"] = norm
        for module, tensor in lora_modules(text).items():
            part = "self_attn" if tensor.part == "attention" else "mlp"
            # In EAGLE-3 these projections take embeddings and states side by side.
            joined = is_eagle3 and module in ("q_proj", "k_proj", "v_proj")
            shape = (tensor.shape[0], tensor.shape[1] * (1 + joined))
            named[f"{prefix}.{part}.{module}.weight"] = shape
    return named


def with_draft(model: Model, algorithm: str | None, path: str | None, tokens: int | None) -> Model:
    """Return the model with its draft in ``path``, which proposes ``tokens`` tokens a step.

    If neither algorithm, path nor tokens are given, the model is returned unchanged.

    Raises:
        UsageError: LMDeploy would end on the draft, or turbofit has no account of it.
    """
    if algorithm is None and path is None and tokens is None:
        return model
    tokens = tokens or 1
    if tokens > _MOST_TOKENS:
        raise _refusal(
            f"`--speculative-num-draft-tokens {tokens}`: turbofit plans up to {_MOST_TOKENS}",
            "for more, the engine takes more blocks of the cache than a plan keeps free",
        )
    if algorithm in _OWN:
        return replace(model, draft=_own_layers(model, str(algorithm), path, tokens))
    _refuse_beside(model, algorithm, path)
    return replace(model, draft=_read(model, str(algorithm), str(path).strip(), tokens))


def _refuse_beside(model: Model, algorithm: str | None, path: str | None) -> None:
    """Refuse an algorithm or a path for a draft beside the model."""
    option = "`--speculative-algorithm`"
    if algorithm is None:
        raise _refusal(f"LMDeploy loads no draft without {option}", f"give {option}")
    if algorithm in _UNPLANNED:
        raise _refusal(f"{option} {algorithm}: {_UNPLANNED[algorithm]}", _WITHOUT)
    if algorithm == EAGLE3 and model.text.architecture == _KIMI:
        raise _refusal(
            f"{option} {algorithm}: turbofit has no account of Kimi's draft, which each rank has",
            _WITHOUT,
        )
    if model.architecture != _LLAMA:
        raise _refusal(
            f"LMDeploy {REFERENCE} has {algorithm} for {_LLAMA}, and {model.name} is"
            f" {model.architecture}",
            _WITHOUT,
        )
    if path is None:
        raise _refusal(f"{option} {algorithm} needs a draft", "give `--speculative-draft-model`")


def _own_layers(model: Model, algorithm: str, path: str | None, tokens: int) -> Draft:
    """Return the draft that is layers of the model's own checkpoint.

    Raises:
        UsageError: LMDeploy or turbofit has no such draft of the model.
    """
    text, option = model.text, f"`--speculative-algorithm {algorithm}`"
    layers = 1 if text.draft_layers is UNSET else text.draft_layers
    name = _OWN[algorithm].get(text.architecture)
    if name is None:
        models = ", ".join(_OWN[algorithm])
        raise _refusal(f"{option} is planned for {models}, not {text.architecture}", _WITHOUT)
    if path is not None:
        raise _refusal(
            f"{option}: the draft is a part of {model.name}'s own checkpoint",
            "leave `--speculative-draft-model` out",
        )
    if not layers or not _is_stored(model, name.format(text.layers)):
        raise _refusal(
            f"the checkpoint of {model.name} has no layers that propose tokens", _WITHOUT
        )
    moe = text.moe and replace(text.moe, layers=layers)
    dims = replace(text, layers=layers, delta=None, moe=moe, tie_word_embeddings=False)
    # Qwen's draft has the base's embeddings and head; DeepSeek's class has both of its own.
    owns = algorithm == "deepseek_mtp"
    rows = text.vocab if owns else 0
    return Draft(
        algorithm=algorithm, path="", tokens=tokens, text=dims, head_rows=rows, embeds=owns
    )


def _is_stored(model: Model, name: str) -> bool:
    """Return whether a checkpoint on disk has a tensor; True if its tensors cannot be listed."""
    folder = model.source.checkpoint
    stored = FolderFiles(folder).weights().tensors if folder else None
    return stored is None or any(tensor.endswith(name) for tensor in stored)


def _read(model: Model, algorithm: str, path: str, tokens: int) -> Draft:
    """Read and check the draft in the folder or hub id ``path``."""
    folder = located(path, "config.json", "the draft's folder")
    files, is_eagle3 = FolderFiles(folder), algorithm == EAGLE3
    config = read_section(files, "config.json", "the draft's config.json") or Section({}, path)
    named = next(iter(config.strings("architectures")), "none")
    if named != _LLAMA:
        raise _refusal(
            f"the draft's architecture is {named[:80]}, and LMDeploy {REFERENCE} has {algorithm}"
            f" for {_LLAMA} alone"
        )
    text = read_text(config, named)
    rows = config.integer("draft_vocab_size", text.vocab) if is_eagle3 else 0
    draft = Draft(algorithm=algorithm, path=folder, tokens=tokens, text=text, head_rows=rows)
    _check(model, draft, config)
    return _with_file(draft, files)


def _with_file(draft: Draft, files: FolderFiles) -> Draft:
    """Return the draft, with embeddings only if its file has embeddings.

    Raises:
        UsageError: the file does not have exactly the tensors that LMDeploy's class loads.
    """
    stored, is_eagle3 = files.weights().tensors, draft.algorithm == EAGLE3
    if stored is None:
        size = sum(files.size(name) or 0 for name in files.names() if name.endswith(".bin"))
        elements = sum(prod(shape) for shape in draft_tensors(draft).values())
        # Only the size of torch's files is known; an element has two bytes or more.
        return replace(draft, embeds=not is_eagle3 or size >= 2 * elements)
    draft = replace(draft, embeds=not is_eagle3 or "embed_tokens.weight" in stored)
    wanted = draft_tensors(draft) | ({"d2t": (draft.head_rows,)} if is_eagle3 else {})
    found = {name: tensor.shape for name, tensor in stored.items() if name != "t2d"}
    unlike = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if unlike:
        raise _refusal(
            f"{draft.path} is no {draft.algorithm} draft of the dimensions in its config.json:"
            f" LMDeploy's class and the file differ in {unlike[0][:120]}"
        )
    return draft


def _check(model: Model, draft: Draft, config: Section) -> None:
    """Refuse a draft whose dimensions do not suit the model."""
    text, base, is_eagle3 = draft.text, model.text, draft.algorithm == EAGLE3
    states = config.integer("target_hidden_size", text.hidden)
    checkpoint = model.source.checkpoint or model.name
    if os.path.realpath(checkpoint) == os.path.realpath(draft.path):
        raise _unfit(draft, f"it is {model.name} itself")
    if text.vocab != base.vocab:
        its, own = f"{text.vocab:,}", f"{base.vocab:,}"
        raise _unfit(draft, f"its vocabulary has {its} tokens, and that of {model.name} {own}")
    if {text.hidden, states} != {base.hidden}:
        raise _unfit(draft, f"it has {text.hidden} hidden channels, and {model.name} {base.hidden}")
    if is_eagle3 and text.layers > 1:
        runs = f"LMDeploy {REFERENCE} runs EAGLE-3 drafts of one layer"
        raise _unfit(draft, f"{runs}, and it has {text.layers}")
    if is_eagle3 and base.layers < _LEAST_LAYERS:
        raise _unfit(
            draft, f"EAGLE-3 reads three layers, of a base of {_LEAST_LAYERS} layers or more"
        )
    if text.tie_word_embeddings:
        raise _unfit(
            draft, f"LMDeploy {REFERENCE} takes no draft whose head is tied to its embeddings"
        )
    if text.qkv_bias or text.mlp_bias or "quantization_config" in config:
        raise _unfit(draft, "it has biases or is quantised, and turbofit has no account of that")


def _unfit(draft: Draft, problem: str) -> UsageError:
    return _refusal(f"the draft in {draft.path}: {problem}")


def _refusal(problem: str, hint: str = _HINT) -> UsageError:
    return UsageError(problem, hint=hint, options=["speculative_draft_model"])
