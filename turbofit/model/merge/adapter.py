"""Reads a LoRA adapter as peft saves it: what it adds to which module, and what it replaces.

`adapter_config.json` says rank and scaling, `adapter_model.safetensors` or `.bin` holds the
matrices. LLaVA's own trainer puts what it trained besides LoRA into `non_lora_trainables.bin`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.model.checkpoint import read_section
from turbofit.model.config import Section
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.files import StoredTensor, open_tensors, torch_library

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
_REFUSED: Final = (
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices",
    "lora_bias", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
)  # fmt: skip
#: Initialisations that change the base as well: W + s·B·A holds for the changed base alone.
_RESIDUAL: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HINT: Final = "merge it with peft's own merge_and_unload, where the base fits into RAM"


class Lora(NamedTuple):
    """What is added to the weight of one module, (out, in): ``scaling · B @ A``."""

    a: StoredTensor
    b: StoredTensor
    scaling: float
    magnitude: StoredTensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes: (out, in)."""
        return self.b.shape[0], self.a.shape[1]

    def merged(self, weight: Any) -> Any:
        """The merged weight, with the bits that peft gives; ``weight`` is changed.

        The order of operations and their dtypes are those of ``PeftModel.from_pretrained(base,
        adapter).merge_and_unload()`` in peft 0.21 on a CPU, which keeps the adapter in float32:
        the delta is added in float32 and rounded once. DoRA scales each row of W + delta to the
        learnt magnitude, and is rounded once, too.
        """
        delta = self.b.read().float() @ self.a.read().float()
        delta *= self.scaling
        if self.magnitude is None:
            weight += delta
            return weight
        summed = weight + delta
        norms = torch_library().linalg.norm(summed, dim=1)
        magnitude = self.magnitude.read().float().reshape(-1)
        return ((magnitude / norms).view(-1, 1) * summed).to(weight.dtype)


class Adapter(NamedTuple):
    """What an adapter changes: names of tensors, each with what is added or takes its place."""

    changes: tuple[tuple[str, Lora | StoredTensor], ...] = ()
    base_name: str = ""


def read_adapter(folder: str) -> Adapter:
    """Read the adapter in a folder.

    Raises:
        UsageError: no adapter, a damaged one, or a kind that W + s·B·A does not describe.
    """
    files = FolderFiles(folder)
    config = read_section(files, ADAPTER_CONFIG)
    if config is None:
        raise UsageError(
            f"{folder} has no {ADAPTER_CONFIG}",
            hint="name the folder that peft's save_pretrained wrote",
        )
    _check(config)
    weights = next((name for name in _WEIGHTS if files.size(name) is not None), None)
    if weights is None:
        raise UsageError(
            f"{folder} has neither {' nor '.join(_WEIGHTS)}", hint="finish the adapter's download"
        )
    parts: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for key, tensor in open_tensors(folder, weights).items():
        if match := _LORA.fullmatch(key):
            part = "bias" if match["kind"] == "bias" else match["part"]
            parts.setdefault(match["module"], {})[part] = tensor
        else:
            whole[_WRAPPED.sub(".", key)] = tensor
    for name in _BESIDES:
        if files.size(name) is not None:
            whole |= open_tensors(folder, name)
    loras = [(f"{module}.weight", _lora(config, module, kinds)) for module, kinds in parts.items()]
    return Adapter((*loras, *whole.items()), config.string("base_model_name_or_path", ""))


def _check(config: Section) -> None:
    """Refuse what is no plain LoRA (or DoRA)."""
    kind = config.string("peft_type", "LORA")
    if kind.upper() != "LORA":
        raise UsageError(f"{config.what}: {kind[:30]} is not LoRA", hint=_HINT)
    for key in _REFUSED:
        if config.values.get(key):
            raise UsageError(f"{config.what}: LoRA with {key} is not merged here", hint=_HINT)
    begun = config.values.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_RESIDUAL):
        raise UsageError(
            f"{config.what}: init_lora_weights is {begun[:30]!r}, which had changed the base too",
            hint="save it with path_initial_model_for_weight_conversion, as peft's guide says",
        )
    if config.string("bias", "none") not in ("none", "all", "lora_only"):
        raise config.error("bias", "is not none, all or lora_only")


def _lora(config: Section, module: str, kinds: Mapping[str, StoredTensor]) -> Lora:
    """The pair of matrices of one module, checked against the rank that the config says."""
    plain = module.removeprefix("base_model.model.")
    if not kinds.keys() <= {"A", "B", "magnitude_vector"}:
        what = "a bias of B" if "bias" in kinds else "LoRA on embeddings"
        raise UsageError(f"{plain[:100]} has {what}, which is not merged here", hint=_HINT)
    if "A" not in kinds or "B" not in kinds:
        raise UsageError(
            f"the adapter has one half of the LoRA of {plain[:100]} only",
            hint="save the adapter again: a tensor is missing",
        )
    a, b = kinds["A"], kinds["B"]
    rank, alpha = config.integer("r", 8), config.values.get("lora_alpha", 8)
    if type(alpha) is not int:  # an integer stays one, so that the quotient has peft's bits
        alpha = config.number("lora_alpha", 8, low=-1e6, high=1e6)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UsageError(
            f"{plain[:100]} has LoRA matrices of {len(a.shape)} dimensions: convolutions and"
            " experts are not merged here",
            hint=_HINT,
        )
    if a.shape[0] != rank or b.shape[1] != rank:
        raise UsageError(
            f"{plain[:100]} has LoRA matrices of rank {a.shape[0]} and {b.shape[1]}, the config"
            f" says {rank}",
            hint="take config and weights of the same run",
        )
    divisor = math.sqrt(rank) if config.boolean("use_rslora", False) else rank
    return Lora(a, b, alpha / divisor, kinds.get("magnitude_vector"))
