"""Puts a model together from a checkpoint's files, wherever these lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, Protocol

from turbofit.core.errors import UsageError
from turbofit.core.model import Dtype, Model, ModelSource
from turbofit.model.checks import cross_check, stored_dtype, surplus, without_unused
from turbofit.model.config import Section, dtype_of, parse_json
from turbofit.model.families.registry import WATCHING, read_dims
from turbofit.model.families.text import TEXT_ARCHITECTURES
from turbofit.model.parameters import parameters, stored_bytes
from turbofit.model.quantization import read_quantization
from turbofit.model.safetensors import Tensor

__all__ = ["Files", "Origin", "Weights", "read_checkpoint"]

#: Architectures whose config class is the checkpoint's own code, and whose account needs it.
_REMOTE_CONFIG: Final = frozenset(
    {
        "InternS1ProForConditionalGeneration",
        "InternS1_1_ForConditionalGeneration",
        "InternVLChatModel",
        "KimiK25ForConditionalGeneration",
        "CogVLMForCausalLM",
        "ChatGLMModel",
        "ChatGLMForConditionalGeneration",
        "DeepseekForCausalLM",
        "Phi3VForCausalLM",
        "InternS2PreviewForConditionalGeneration",
    }
)


class Weights(NamedTuple):
    """Headers of all weight files; ``tensors`` None where there are none that can be read."""

    tensors: Mapping[str, Tensor] | None
    warning: str | None = None


class Origin(NamedTuple):
    """Where a checkpoint comes from, as :class:`ModelSource` will say it."""

    name: str
    kind: Literal["folder", "hub_cache", "hub"]
    where: str
    hub_id: str | None = None
    checkpoint: str | None = None


class Files(Protocol):
    """A checkpoint's files."""

    def read(self, name: str) -> bytes | None:
        """A small file's bytes, None where there is no such file."""

    def weights(self) -> Weights:
        """Headers of the weight files."""


def read_checkpoint(files: Files, origin: Origin) -> Model:
    """Read one checkpoint.

    Raises:
        UsageError: a file is missing, damaged, contradicts another, or the model is not one that
            turbofit accounts for.
    """
    config = _section(files, "config.json")
    if config is None:
        raise UsageError(
            f"{origin.where} has no config.json", hint="name a folder in Hugging Face's format"
        )
    warnings: list[str] = []
    architecture = _architecture(config)
    processor = _processor(files, "image_processor", "preprocessor_config.json")
    video = None
    if architecture in WATCHING:
        video = _processor(files, "video_processor", "video_preprocessor_config.json")
    dims = read_dims(config, architecture, processor, warnings, video)
    quantization = read_quantization(config)
    weights = files.weights()
    if weights.warning:
        warnings.append(weights.warning)
    tensors = None if weights.tensors is None else without_unused(weights.tensors)
    dtype = _dtype(config, tensors, warnings)
    if tensors is not None:
        cross_check(tensors, dims.text, dims.vision)
        extra = surplus(tensors, dims.text, dims.vision, quantization)
        if extra:
            warnings.append(
                f"the checkpoint holds {abs(extra):,} elements {'more' if extra > 0 else 'fewer'} "
                "than its dims explain; the plan counts what the dims explain"
            )
    return Model(
        name=origin.name,
        architecture=architecture,
        parameters=parameters(dims.text, dims.vision),
        weight_bytes=sum(tensor.bytes for tensor in tensors.values())
        if tensors is not None
        else stored_bytes(dims.text, dims.vision, dtype, quantization),
        dtype=dtype,
        text=dims.text,
        vision=dims.vision,
        image_rule=dims.rule,
        quantization=quantization,
        tensor_bytes=_by_dtype(tensors or {}),
        needs_remote_code=_remote_code(files, config, architecture, processor),
        hub_id=origin.hub_id,
        source=ModelSource(
            kind=origin.kind,
            where=origin.where,
            sizes="formula" if tensors is None else "file",
            checkpoint=origin.checkpoint,
        ),
        warnings=tuple(warnings),
    )


def _section(files: Files, name: str) -> Section | None:
    data = files.read(name)
    return None if data is None else parse_json(data, name)


def _architecture(config: Section) -> str:
    """``architectures[0]``, else the class that ``auto_map`` names, as LMDeploy reads it."""
    names = config.strings("architectures")
    if names:
        return names[0]
    mapped = config.section("auto_map")
    model = mapped.string("AutoModelForCausalLM", "") if mapped else ""
    if not model:
        raise config.error("architectures", "is missing")
    return model.rpartition(".")[2]


def _processor(files: Files, key: str, name: str) -> Section | None:
    """An image or video processor's settings; those nested in processor_config.json win."""
    outer = _section(files, "processor_config.json")
    nested = outer.section(key) if outer else None
    return nested or _section(files, name)


def _dtype(config: Section, tensors: Mapping[str, Tensor] | None, warnings: list[str]) -> Dtype:
    """The unquantised tensors' dtype: as stored, else as the config says."""
    stored, second = stored_dtype(tensors or {})
    if second:
        warnings.append(f"the checkpoint mixes {stored} and {second}; the plan assumes {stored}")
    for name in (stored, dtype_of(config), *_inner_dtypes(config)):
        if name is not None:
            return name
    warnings.append("neither config.json nor the weights say the dtype: bfloat16 is assumed")
    return "bfloat16"


def _inner_dtypes(config: Section) -> list[Dtype | None]:
    parts = [config.section(key) for key in ("text_config", "llm_config", "thinker_config")]
    return [dtype_of(part) for part in parts if part]


def _by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return dict(sorted(sizes.items()))


def _remote_code(files: Files, config: Section, architecture: str, images: Section | None) -> bool:
    """Whether LMDeploy needs ``--trust-remote-code`` for this checkpoint.

    The tokenizer's own class is one reason; the processor's another, for the families that load
    one. The third is a config class: without InternVLChatModel's, LMDeploy 0.18 reads
    ``llm_config`` as a plain dict and fails at its first attribute; without the others' it has
    only the keys that config.json spells out, none of the class's own defaults.
    """
    mapped = config.section("auto_map")
    if architecture in _REMOTE_CONFIG and mapped and "AutoConfig" in mapped:
        return True
    tokenizer = _section(files, "tokenizer_config.json")
    classes = tokenizer.section("auto_map") if tokenizer else None
    if classes and "AutoTokenizer" in classes:
        return True
    named = bool(tokenizer and tokenizer.string("tokenizer_class", ""))
    if mapped and "AutoTokenizer" in mapped and not named:
        return True
    if architecture in TEXT_ARCHITECTURES or architecture == "InternVLChatModel":
        return False
    processors = (_section(files, "processor_config.json"), images)
    maps = (part.section("auto_map") for part in processors if part)
    return any(part and ("AutoProcessor" in part or "AutoImageProcessor" in part) for part in maps)
