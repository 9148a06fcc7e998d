"""Reads a LoRA adapter as peft saves it: what it adds to which module, and what it replaces.

`adapter_config.json` says rank and scaling, `adapter_model.safetensors` or `.bin` holds the
matrices. LLaVA's own trainer puts what it trained besides LoRA into `non_lora_trainables.bin`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.model.config import Section, parse_json
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.tensors import TensorFile, open_store

__all__ = ["ADAPTER_CONFIG", "Adapter", "Lora", "WholeTensor", "read_adapter"]

#: The file that makes a folder an adapter.
ADAPTER_CONFIG: Final = "adapter_config.json"

_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDES: Final = ("non_lora_trainables.bin", "non_lora_state_dict.bin")
_LORA: Final = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.(?P<kind>weight|bias))?"
)
_WRAPPED: Final = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?!(?:weight|bias)$)[^.]+)?)\.")
#: Settings of peft under which the merged weight is something else than W + s·B·A.
_REFUSED: Final = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA, which works on a part of the tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on parameters of experts",
    "trainable_token_indices": "single trained token embeddings",
}
#: Initialisations that change the base as well: W + s·B·A holds for the changed base alone.
_RESIDUAL: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HINT: Final = "merge it with peft's own merge_and_unload, where the base fits into RAM"
_LARGEST: Final = 1 << 20


class Lora(NamedTuple):
    """What is added to one module's weight: ``scaling · B @ A``; the names are the store's."""

    module: str
    a: str
    b: str
    rank: int
    scaling: float
    embedding: bool
    magnitude: str | None
    bias: str | None


class WholeTensor(NamedTuple):
    """A tensor that takes the place of the base's."""

    store: TensorFile
    key: str


class Adapter(NamedTuple):
    """One adapter. ``whole`` goes by the base's tensor names, as far as peft knows them."""

    folder: str
    store: TensorFile
    loras: tuple[Lora, ...]
    whole: Mapping[str, WholeTensor]
    base_name: str
    fan_in_fan_out: bool


def read_adapter(folder: str) -> Adapter:
    """Read the adapter in a folder.

    Raises:
        UsageError: no adapter, a damaged one, or a kind that W + s·B·A does not describe.
    """
    files = FolderFiles(folder)
    data = files.read(ADAPTER_CONFIG)
    if data is None:
        raise UsageError(
            f"{folder} has no {ADAPTER_CONFIG}",
            hint="name the folder that peft's save_pretrained wrote",
        )
    config = parse_json(data, ADAPTER_CONFIG)
    _check(config)
    store = open_store(_first(folder, files))
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, WholeTensor] = {}
    for key in store.entries:
        match = _LORA.fullmatch(key)
        if match:
            part = "bias" if match["kind"] == "bias" else match["part"]
            parts.setdefault(match["module"], {})[part] = key
        else:
            whole[_WRAPPED.sub(".", key)] = WholeTensor(store, key)
    for name in _BESIDES:
        if files.size(name) is not None:
            besides = open_store(os.path.join(folder, name))
            whole.update({key: WholeTensor(besides, key) for key in besides.entries})
    loras = tuple(_lora(config, store, module, found) for module, found in parts.items())
    return Adapter(
        folder=folder,
        store=store,
        loras=loras,
        whole=whole,
        base_name=config.string("base_model_name_or_path", ""),
        fan_in_fan_out=config.boolean("fan_in_fan_out", False),
    )


def _first(folder: str, files: FolderFiles) -> str:
    for name in _WEIGHTS:
        if files.size(name) is not None:
            return os.path.join(folder, name)
    raise UsageError(
        f"{folder} has neither {' nor '.join(_WEIGHTS)}", hint="finish the adapter's download"
    )


def _check(config: Section) -> None:
    """Refuse what is no plain LoRA (or DoRA)."""
    kind = config.string("peft_type", "LORA")
    if kind.upper() != "LORA":
        raise UsageError(f"{config.what}: {kind[:30]} is not LoRA", hint=_HINT)
    for key, what in _REFUSED.items():
        if config.values.get(key):
            raise UsageError(f"{config.what}: {key}: {what} is not merged here", hint=_HINT)
    made = config.values.get("init_lora_weights")
    if isinstance(made, str) and made.lower().startswith(_RESIDUAL):
        raise UsageError(
            f"{config.what}: init_lora_weights is {made[:30]!r}, which had changed the base too",
            hint="save it with path_initial_model_for_weight_conversion, as peft's guide says",
        )
    if config.string("bias", "none") not in ("none", "all", "lora_only"):
        raise config.error("bias", "is not none, all or lora_only")


def _lora(config: Section, store: TensorFile, module: str, found: dict[str, str]) -> Lora:
    """The pair of matrices of one module, checked against the rank that the config says."""
    embedding = "embedding_A" in found or "embedding_B" in found
    prefix = "embedding_" if embedding else ""
    if f"{prefix}A" not in found or f"{prefix}B" not in found:
        raise UsageError(
            f"{os.path.basename(store.path)}: {module[:100]} has one half of its LoRA only",
            hint="save the adapter again: a tensor is missing",
        )
    a, b = found[f"{prefix}A"], found[f"{prefix}B"]
    plain = module.removeprefix("base_model.model.")
    if not _selected(config.values.get("target_modules"), plain):
        raise UsageError(
            f"{config.what}: target_modules does not select {plain[:100]}, which the weights hold",
            hint="peft would leave it out: take config and weights of the same run",
        )
    rank = _patterned(config, "rank_pattern", plain, config.integer("r", 8))
    alpha = _patterned(config, "alpha_pattern", plain, _alpha(config))
    one, other = store.entries[a].shape, store.entries[b].shape
    if len(one) != 2 or len(other) != 2:
        raise UsageError(
            f"{plain[:100]} has LoRA matrices of {len(one)} dimensions: convolutions and experts"
            " are not merged here",
            hint=_HINT,
        )
    if one[0] != rank or other[1] != rank:
        raise UsageError(
            f"{plain[:100]} has LoRA matrices of rank {one[0]} and {other[1]}, the config says"
            f" {rank:g}",
            hint="take config and weights of the same run",
        )
    root = config.boolean("use_rslora", False)
    magnitude = found.get("magnitude_vector")
    if embedding and magnitude:
        raise UsageError(f"{plain[:100]}: DoRA of embeddings is not merged here", hint=_HINT)
    return Lora(
        module=module,
        a=a,
        b=b,
        rank=one[0],
        scaling=alpha / math.sqrt(rank) if root else alpha / rank,
        embedding=embedding,
        magnitude=magnitude,
        bias=found.get("bias"),
    )


def _alpha(config: Section) -> float:
    value = config.values.get("lora_alpha", 8)
    return value if type(value) is int else config.number("lora_alpha", 8, low=-1e6, high=1e6)


def _patterned(config: Section, key: str, module: str, default: float) -> Any:
    """A value of ``rank_pattern`` or ``alpha_pattern``, found as peft finds it."""
    patterns = config.section(key)
    for pattern in patterns.values if patterns else ():
        if _matches(rf"(.*\.)?({pattern})", module, f"{config.what}: {key}"):
            assert patterns is not None
            if key == "rank_pattern":
                return patterns.integer(pattern, high=_LARGEST)
            value = patterns.values[pattern]
            number = patterns.number(pattern, default, low=-1e6, high=1e6)
            return value if type(value) is int else number
    return default


def _selected(targets: Any, module: str) -> bool:
    """Whether ``target_modules`` covers a module: a list of last names, or one pattern."""
    if isinstance(targets, str):
        if targets == "all-linear":
            return True
        return _matches(targets, module, f"{ADAPTER_CONFIG}: target_modules")
    if not isinstance(targets, list):
        return True
    return any(module == name or module.endswith(f".{name}") for name in targets)


def _matches(pattern: str, text: str, what: str) -> bool:
    try:
        return re.fullmatch(pattern, text) is not None
    except re.error as exc:
        raise UsageError(f"{what} is not a pattern: {exc}", hint="mend the config") from None
