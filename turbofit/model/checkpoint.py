"""Builds a model from a checkpoint's config.json and tensors, and checks that they agree."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Dtype, Model, ModelSource, Quantization
from turbofit.model.config import Section, dtype_of, parse_json
from turbofit.model.families.dims import CheckpointConfig, Dims
from turbofit.model.families.registry import WATCHING, read_dims
from turbofit.model.families.text import TEXT_ARCHITECTURES
from turbofit.model.parameters import parameters, stored_bytes
from turbofit.model.quantization import read_quantization
from turbofit.model.safetensors import Tensor

#: Architectures that need remote code: their config class is the checkpoint's own code.
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

_VISION: Final = re.compile(
    r"(^|\.)(vision|vision_model|vision_tower|visual|vision_embed_tokens)\."
)
_LAYER: Final = re.compile(r"\.(?:layers|layer|blocks)\.(\d+)\.")
#: Further stacks of layers, whose numbers begin at 0 again.
_APART: Final = ("audio_tower.", ".global_transformer.")
#: The shares of its parameters that a checkpoint holds: a copy of a tied head, drafts and heads for
#: other tasks may come on top.
_LEAST, _MOST = 0.99, 1.5
_DIFFER: Final = "config.json and the weights are of different models: download them together"
_FLOATS: Final[dict[str, Dtype]] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
#: Buffers in old checkpoints that are not parameters.
_BUFFERS: Final = (".inv_freq", "mask_token")
#: A draft model for speculative decoding: a part of its own, or a layer after the last one.
_DRAFT: Final = "mtp."
#: Speech output; models that also speak have it beside the text model.
_SPEECH: Final = ("talker.", "code2wav.", "token2wav.")
#: Intern-S2's encoder and head for time series; no engine of LMDeploy loads them.
_TIME_SERIES: Final = ("model.time_series.", "time_series_forecaster.")
_DRAFT_LAYER: Final = ".eh_proj.weight"


class Weights(NamedTuple):
    """The headers of all weight files; ``tensors`` is None if no file can be read."""

    tensors: Mapping[str, Tensor] | None
    warning: str | None = None


class Files(Protocol):
    """The files of one checkpoint, in a folder or on a hub."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""

    def weights(self) -> Weights:
        """Read the headers of the weight files."""


def read_checkpoint(
    files: Files,
    source: ModelSource,
    hub_id: str | None = None,
    *,
    weights: Weights | None = None,
) -> Model:
    """Read a checkpoint's config and tensors into a model.

    Args:
        files: the checkpoint's files.
        source: where they are; this function sets its ``sizes``.
        hub_id: the hub's id; None for a folder.
        weights: replaces the weights of ``files``.

    Raises:
        UsageError: a file is missing, damaged, contradicts another, or the model is not one that
            turbofit accounts for.
    """
    config = read_section(files, "config.json")
    if config is None:
        raise UsageError(
            f"{source.where} has no config.json", hint="name a folder in Hugging Face's format"
        )
    warnings: list[str] = []
    # As LMDeploy reads it.
    mapped = config.part("auto_map").string("AutoModelForCausalLM", "").rpartition(".")[2]
    architecture = next(iter(config.strings("architectures")), mapped)
    config.refuse_if(not architecture, "architectures", "is missing")
    processor = _processor(files, "image_processor", "preprocessor_config.json")
    watches, name = architecture in WATCHING, "video_preprocessor_config.json"
    video = _processor(files, "video_processor", name) if watches else None
    dims = read_dims(CheckpointConfig(config, architecture, processor, warnings, video))
    quantization = read_quantization(config)
    weights = weights or files.weights()
    if weights.warning:
        warnings.append(weights.warning)
    tensors = weights.tensors
    if tensors is not None:  # no engine loads drafts, speech output and time series
        layers = [name.removesuffix(_DRAFT_LAYER[1:]) for name in tensors if _DRAFT_LAYER in name]
        unused = (_DRAFT, *_SPEECH, *_TIME_SERIES, *layers)
        tensors = {name: tensors[name] for name in tensors if not name.startswith(unused)}
    by_dtype = Counter[str]()
    for tensor in (tensors or {}).values():
        by_dtype[tensor.dtype] += tensor.bytes
    sizes = dict(sorted(by_dtype.items()))
    dtype = _dtype(config, sizes, warnings)
    if tensors is not None and (surplus := _surplus(tensors, dims, quantization)):
        warnings.append(surplus)
    return Model(
        name=hub_id.rpartition("/")[2] if hub_id else os.path.basename(source.where),
        architecture=architecture,
        parameters=parameters(dims.text, dims.vision),
        weight_bytes=stored_bytes(dims.text, dims.vision, dtype, quantization)
        if tensors is None
        else sum(sizes.values()),
        dtype=dtype,
        text=dims.text,
        vision=dims.vision,
        image_rule=dims.rule,
        quantization=quantization,
        tensor_bytes=sizes,
        needs_remote_code=_remote_code(files, config, architecture, processor),
        hub_id=hub_id,
        source=replace(source, sizes="formula" if tensors is None else "file"),
        warnings=tuple(warnings),
    )


def read_section(files: Files, name: str, what: str = "") -> Section | None:
    """The object in a JSON file, named ``what`` in messages; None if the file does not exist."""
    data = files.read(name)
    return None if data is None else parse_json(data, what or name)


def _processor(files: Files, key: str, name: str) -> Section | None:
    """An image or video processor's settings; those nested in processor_config.json win."""
    outer = read_section(files, "processor_config.json")
    nested = outer.section(key) if outer else None
    return nested or read_section(files, name)


def _dtype(config: Section, sizes: Mapping[str, int], warnings: list[str]) -> Dtype:
    """The dtype of most bytes of the unquantised tensors; without tensors, the config's."""
    floats = sorted(
        ((sizes[name], _FLOATS[name]) for name in sizes if name in _FLOATS), reverse=True
    )
    if floats:
        (_, stored), *others = floats
        if others and others[0][0] > 0.01 * sum(size for size, _ in floats):
            second = others[0][1]
            mixed = f"the checkpoint mixes {stored} and {second}"
            warnings.append(f"{mixed}; the plan assumes {stored}")
        return stored
    parts = (config.section(key) for key in ("text_config", "llm_config", "thinker_config"))
    for part in (config, *parts):
        if part and (name := dtype_of(part)):
            return name
    warnings.append("neither config.json nor the weights say the dtype: bfloat16 is assumed")
    return "bfloat16"


def _remote_code(files: Files, config: Section, architecture: str, images: Section | None) -> bool:
    """Whether LMDeploy needs ``--trust-remote-code``: for a tokenizer, a processor or a config.

    LMDeploy cannot read ``llm_config`` without InternVLChatModel's config class: it stays a plain
    dict and fails at its first attribute. Without the config classes of the others, LMDeploy lacks
    defaults.
    """
    mapped, name = config.part("auto_map"), "tokenizer_config.json"
    if architecture in _REMOTE_CONFIG and "AutoConfig" in mapped:
        return True
    tokenizer = read_section(files, name) or Section({}, name)
    named = bool(tokenizer.string("tokenizer_class", ""))
    if "AutoTokenizer" in tokenizer.part("auto_map") or ("AutoTokenizer" in mapped and not named):
        return True
    if architecture in TEXT_ARCHITECTURES or architecture == "InternVLChatModel":
        return False
    processors = (read_section(files, "processor_config.json"), images)
    maps = [part.part("auto_map") for part in processors if part]
    return any("AutoProcessor" in part or "AutoImageProcessor" in part for part in maps)


def _surplus(tensors: Mapping[str, Tensor], dims: Dims, packed: Quantization | None) -> str:
    """A warning if the tensors hold more or fewer elements than these dims explain; or empty.

    Raises:
        UsageError: they are of another model, by their layers or by their number.
    """
    _count_layers(tensors, "language model", dims.text.layers, vision=False)
    if dims.vision:
        _count_layers(tensors, "vision tower", dims.vision.layers, vision=True)
    stored = sum(tensor.elements for name, tensor in tensors.items() if not name.endswith(_BUFFERS))
    known = parameters(dims.text, dims.vision)
    extra = 0 if packed else stored - known
    if not _LEAST * known <= known + extra <= _MOST * known:
        raise UsageError(
            f"config.json says {known:,} parameters, but the weights hold {stored:,}", hint=_DIFFER
        )
    said = f"the checkpoint holds {abs(extra):,} elements {'more' if extra > 0 else 'fewer'} than"
    return f"{said} its dims explain; the plan counts what the dims explain" if extra else ""


def _count_layers(tensors: Mapping[str, Tensor], what: str, expected: int, *, vision: bool) -> None:
    """Check the number of layers: they must be numbered from 0 without a gap."""
    numbers = {
        int(match[1][:9])
        for name in tensors
        if not any(part in name for part in _APART) and bool(_VISION.search(name)) is vision
        and (match := _LAYER.search(name))
    }  # fmt: skip
    if len(numbers) != expected or max(numbers, default=-1) != expected - 1:
        raise UsageError(
            f"config.json says {expected} layers in the {what}, the checkpoint has {len(numbers)}",
            hint=_DIFFER,
        )
