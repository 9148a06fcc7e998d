"""Builds a model from a checkpoint's config.json and tensors, and checks that they agree."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, Protocol

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Dtype, Model, ModelSource, Quantization
from turbofit.core.version import REFERENCE
from turbofit.model.config import Section, dtype_of, parse_json
from turbofit.model.families.dims import CheckpointConfig, Dims
from turbofit.model.families.registry import WATCHING, read_dims
from turbofit.model.families.text import TEXT_ARCHITECTURES
from turbofit.model.parameters import parameters, stored_bytes
from turbofit.model.safetensors import Tensor
from turbofit.model.thinking import thinks

#: Group sizes that at least one engine of LMDeploy can run.
_GROUPS: Final = {"awq": {32, 64, 128}, "gptq": {128}, "compressed-tensors": {32, 128}}
_METHODS: Final = (*_GROUPS, "fp8", "mxfp4")
_BLOCK: Final = (128, 128)
_DEEPEST: Final = 8
#: The strategy of compressed-tensors by the group size, for files without a strategy.
_STRATEGIES: Final = {None: "tensor", -1: "channel"}
_OF_GROUPS: Final = ("group", "tensor_group")
_OTHERS: Final = "take a checkpoint with AWQ (gemm) or GPTQ in groups of 128, or an unquantised one"
#: Architectures whose config class is code of the checkpoint.
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
#: Names of further stacks of layers; the layers of each stack are numbered from 0.
_APART: Final = ("audio_tower.", ".global_transformer.")
#: The fewest and the most elements of a checkpoint, as shares of the model's parameters. A copy of
#: a tied head, a draft, or a head for another task makes the number of elements larger.
_LEAST, _MOST = 0.99, 1.5
_DIFFER: Final = "config.json and the weights are of different models: download them together"
_FLOATS: Final[dict[str, Dtype]] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
#: Ends of the names of buffers in old checkpoints; buffers are not parameters.
_BUFFERS: Final = (".inv_freq", "mask_token")
#: The prefix of a draft model for speculative decoding.
_DRAFT: Final = "mtp."
#: Prefixes of speech output, which models that also speak have.
_SPEECH: Final = ("talker.", "code2wav.", "token2wav.")
#: Intern-S2's encoder and head for time series; no engine of LMDeploy loads them.
_TIME_SERIES: Final = ("model.time_series.", "time_series_forecaster.")
#: A tensor's name by which a draft is known that is stored as a layer after the model's last one.
_DRAFT_LAYER: Final = ".eh_proj.weight"


def read_quantization(config: Section) -> Quantization | None:
    """Read the ``quantization_config``, at any depth of config.json; None if there is none.

    Raises:
        UsageError: no engine of LMDeploy runs this quantisation, or turbofit has no account of it.
    """
    values = quantization_in(config.values)
    if not values:
        return None
    section = Section(values, f"{config.what}: quantization_config")
    method, version = section.string("quant_method", ""), section.string("version", "")
    if method == "smooth_quant":
        raise _without_account(section, "smooth_quant (W8A8)")
    _refuse_method(section, method, version)
    if method == "awq" and version != "gemm":
        raise UsageError(
            f"{section.what}: LMDeploy {REFERENCE}'s TurboMind does not start from AWQ whose"
            f" version is {version!r} instead of 'gemm'",
            hint='write "version": "gemm" into it, if the weights are packed as AutoAWQ packs them'
            " by default",
        )
    if method == "awq":
        return _checked(section, "awq", section.integer("bits", section.integer("w_bit", 4)))
    if method == "gptq":
        quantization = _checked(section, "gptq", section.integer("bits", 4))
        return replace(quantization, unconverted=(*quantization.unconverted, *_left_out(section)))
    if method == "compressed-tensors":
        return _compressed(section)
    if method == "fp8":
        return _fp8(section)
    skipped = section.strings("modules_to_not_convert")
    return Quantization(method="mxfp4", bits=4, group_size=32, unconverted=skipped)


def _refuse_method(section: Section, method: str, version: str) -> None:
    """Refuse a method of quantisation, or a form of it, that no engine of LMDeploy runs."""
    if not method:
        raise _not_run(section, "weights whose quantization_config has no quant_method")
    if method not in _METHODS:
        raise _not_run(section, f"the quantisation {method[:40]!r}")
    if method == "awq" and version.lower() not in ("", "gemm"):
        raise _not_run(section, f"an AWQ version other than gemm, here {version[:40]!r}")
    if method == "gptq" and section.boolean("desc_act", False):
        raise _not_run(section, "GPTQ with desc_act")
    if method == "gptq" and not section.boolean("sym", True):
        raise _not_run(section, "GPTQ without sym")


def _left_out(section: Section) -> list[str]:
    """Return patterns for the modules that GPTQModel's ``dynamic`` leaves unquantised.

    A ``dynamic`` that packs some modules in another way is refused.
    """
    rules = section.part("dynamic").values
    if any(isinstance(rule, dict) and rule for rule in rules.values()):
        raise _not_run(section, "GPTQ with several ways of packing (dynamic)")
    return [f"re:{name[2:]}" for name in rules if name.startswith("-:")]


def _fp8(section: Section) -> Quantization:
    """Read fp8; LMDeploy runs only fp8 with scales for blocks of 128 x 128."""
    block = section.integers("weight_block_size")
    if not block and section.string("activation_scheme", "") == "static":
        raise _without_account(section, "fp8 with one static scale a tensor")
    if block != _BLOCK:
        here = f"blocks of {' x '.join(map(str, block))}" if block else "no blocks"
        raise _not_run(section, f"fp8 without scales for blocks of 128 x 128: it has {here}")
    skipped = section.strings("modules_to_not_convert")
    return Quantization(method="fp8", bits=8, group_size=128, unconverted=skipped)


def _compressed(section: Section) -> Quantization:
    """Read compressed-tensors; LMDeploy runs one group of layers, packed in 4-bit integers."""
    groups = section.part("config_groups")
    group = groups.part("group_0")
    weights = group.part("weights")
    stored = group.string("format", section.string("format", ""))
    kind, bits = weights.string("type", "int"), weights.integer("num_bits", 4)
    size = weights.values.get("group_size")
    if size not in (None, -1):
        size = weights.integer("group_size")
    strategy = weights.string("strategy", "") or _STRATEGIES.get(size, "group")
    # A strategy of groups needs a group size, and every other strategy must have none.
    weights.refuse_if(
        (strategy in _OF_GROUPS) == (size in _STRATEGIES),
        "group_size",
        f"is {size!r} with the strategy {strategy[:20]!r}",
    )
    if not weights.values:
        raise _not_run(section, "compressed-tensors without weights in config_groups.group_0")
    if stored != "pack-quantized" or kind != "int":
        raise _not_run(section, f"compressed-tensors as {stored[:40]!r} of type {kind[:20]!r}")
    if len(groups.values) > 1:
        raise _not_run(section, f"compressed-tensors with {len(groups.values)} groups of layers")
    if strategy not in _OF_GROUPS:
        one = f"one scale a {strategy[:20]}"
        raise _not_run(section, f"compressed-tensors with {bits} bits and {one}")
    quantization = _checked(weights, "compressed-tensors", bits, section)
    if not quantization.of_experts and not group.string("format", ""):
        # TurboMind raises KeyError 'format'; checkpoints with packed experts alone run on the
        # PyTorch engine. Source: lmdeploy turbomind/converter.py::get_tm_config #7c931e
        raise UsageError(
            f"{section.what}: LMDeploy {REFERENCE} does not start, since config_groups.group_0 has"
            " no format",
            hint=f'add "format": "{stored}" to its group_0 in config.json',
        )
    return replace(quantization, asymmetric=not weights.boolean("symmetric", True))


def _checked(
    section: Section,
    method: Literal["awq", "gptq", "compressed-tensors"],
    bits: int,
    outer: Section | None = None,
) -> Quantization:
    """Read how weights are packed; refuse all but 4 bits in group sizes that an engine runs.

    ``outer``: the section that lists the exempt layers; by default, ``section`` lists them.
    """
    outer = outer or section
    group = section.integer("group_size", section.integer("q_group_size", 128, low=-1), low=-1)
    packed = f"{method} with {bits} bits"
    if group == -1:
        raise _not_run(outer, f"{packed} and one scale a channel")
    if bits != 4 or group not in _GROUPS[method]:
        raise _not_run(outer, f"{packed} in groups of {group}")
    skipped = "ignore" if method == "compressed-tensors" else "modules_to_not_convert"
    return Quantization(
        method=method, bits=bits, group_size=group, unconverted=outer.strings(skipped)
    )


def _not_run(section: Section, what: str) -> UsageError:
    return UsageError(f"{section.what}: LMDeploy {REFERENCE} does not run {what}", hint=_OTHERS)


def _without_account(section: Section, what: str) -> UsageError:
    return UsageError(
        f"{section.what}: LMDeploy {REFERENCE}'s PyTorch engine runs {what}, and turbofit has"
        " no account of it",
        hint=_OTHERS,
    )


def quantization_in(values: dict[str, Any], depth: int = _DEEPEST) -> dict[str, Any] | None:
    """Return the first ``quantization_config`` in the config or in its sections, else None."""
    section = values.get("quantization_config")
    if isinstance(section, dict):
        return section
    if depth:
        for value in values.values():
            if isinstance(value, dict) and (inner := quantization_in(value, depth - 1)):
                return inner
    return None


class Weights(NamedTuple):
    """The headers of all weight files, by the tensor's name.

    ``tensors`` is None if no file can be read; ``warning`` then says why.
    """

    tensors: Mapping[str, Tensor] | None
    warning: str | None = None


class Files(Protocol):
    """The files of one checkpoint, in a folder or on a hub."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file; None if the file does not exist."""

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
        source: where the files are; the model's ``source`` is a copy with its own ``sizes``.
        hub_id: the checkpoint's id on the hub; None for a folder.
        weights: used in place of the weights that ``files`` has.

    Raises:
        UsageError: a file is missing or damaged, or contradicts another one, or turbofit has no
            account of the model.
    """
    config = read_section(files, "config.json")
    if config is None:
        raise UsageError(
            f"{source.where} has no config.json", hint="name a folder in Hugging Face's format"
        )
    warnings: list[str] = []
    # Like LMDeploy: the first of ``architectures``, else the class that ``auto_map`` names.
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
    if tensors is not None:
        # No engine loads drafts, speech output or time series.
        drafts = [name.removesuffix(_DRAFT_LAYER[1:]) for name in tensors if _DRAFT_LAYER in name]
        unused = (_DRAFT, *_SPEECH, *_TIME_SERIES, *drafts)
        tensors = {name: tensors[name] for name in tensors if not name.startswith(unused)}
    by_dtype = Counter[str]()
    for tensor in (tensors or {}).values():
        by_dtype[tensor.dtype] += tensor.bytes
    sizes = dict(sorted(by_dtype.items()))
    dtype = _dtype(config, sizes, warnings)
    if tensors is not None and (surplus := _surplus(tensors, dims, quantization)):
        warnings.append(surplus)
    if tensors is None:
        weight_bytes = stored_bytes(dims.text, dims.vision, dtype, quantization)
    else:
        weight_bytes = sum(sizes.values())
    name = hub_id.rpartition("/")[2] if hub_id else os.path.basename(source.where)
    return Model(
        name=name,
        architecture=architecture,
        parameters=parameters(dims.text, dims.vision),
        weight_bytes=weight_bytes,
        dtype=dtype,
        text=dims.text,
        vision=dims.vision,
        image_rule=dims.rule,
        quantization=quantization,
        tensor_bytes=sizes,
        needs_remote_code=_remote_code(files, config, architecture, processor),
        hub_id=hub_id,
        thinks=thinks(name, _chat_template(files)),
        source=replace(source, sizes="formula" if tensors is None else "file"),
        warnings=tuple(warnings),
    )


def _chat_template(files: Files) -> str:
    """Return the checkpoint's chat template; empty if it has none, or several."""
    file = files.read("chat_template.jinja")
    if file is not None:
        return file.decode(errors="replace")
    tokenizer = read_section(files, "tokenizer_config.json")
    template = tokenizer.values.get("chat_template") if tokenizer else None
    return template if isinstance(template, str) else ""


def read_section(files: Files, name: str, what: str = "") -> Section | None:
    """Read the object in the JSON file ``name``; None if the file does not exist.

    Errors call the file ``what``, by default ``name``.
    """
    data = files.read(name)
    return None if data is None else parse_json(data, what or name)


def _processor(files: Files, key: str, name: str) -> Section | None:
    """Read the settings of an image or video processor; None if the checkpoint has none.

    The object ``key`` in processor_config.json wins over the file ``name``.
    """
    outer = read_section(files, "processor_config.json")
    nested = outer.section(key) if outer else None
    return nested or read_section(files, name)


def _dtype(config: Section, sizes: Mapping[str, int], warnings: list[str]) -> Dtype:
    """Return the dtype in which most unquantised bytes are stored.

    ``sizes``: bytes by the name of a stored dtype. Without a known float type among these names,
    the result is the config's dtype, else bfloat16.
    """
    floats = sorted(
        ((sizes[name], _FLOATS[name]) for name in sizes if name in _FLOATS), reverse=True
    )
    if floats:
        (_, stored), *others = floats
        # A hundredth of the bytes or less in another dtype needs no warning.
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
    """Return whether LMDeploy needs ``--trust-remote-code`` for tokenizer, processor or config.

    Some checkpoints have a config class of their own. Without this class, LMDeploy fails on the
    ``llm_config`` of an InternVLChatModel, and does not know the default values of other models.
    """
    mapped, name = config.part("auto_map"), "tokenizer_config.json"
    if architecture in _REMOTE_CONFIG and "AutoConfig" in mapped:
        return True
    tokenizer = read_section(files, name) or Section({}, name)
    named = bool(tokenizer.string("tokenizer_class", ""))
    if "AutoTokenizer" in tokenizer.part("auto_map") or ("AutoTokenizer" in mapped and not named):
        return True
    # For these models, LMDeploy loads no processor that is code of the checkpoint.
    if architecture in TEXT_ARCHITECTURES or architecture == "InternVLChatModel":
        return False
    processors = (read_section(files, "processor_config.json"), images)
    maps = [part.part("auto_map") for part in processors if part]
    return any("AutoProcessor" in part or "AutoImageProcessor" in part for part in maps)


def _surplus(tensors: Mapping[str, Tensor], dims: Dims, packed: Quantization | None) -> str:
    """Return a warning if the number of stored parameters is not the config's, else "".

    For a quantised checkpoint (``packed``) only the numbers of layers are compared.

    Raises:
        UsageError: the numbers of layers or parameters are those of another model.
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
    surplus = (
        f"the checkpoint holds {abs(extra):,} elements {'more' if extra > 0 else 'fewer'} than"
    )
    return (
        f"{surplus} its config.json explains; the plan counts what config.json explains"
        if extra
        else ""
    )


def _count_layers(tensors: Mapping[str, Tensor], what: str, expected: int, *, vision: bool) -> None:
    """Refuse tensors whose layers are not numbered from 0 to ``expected`` - 1.

    ``vision``: whether to count the layers of the vision tower, or all other layers. Errors call
    the layers ``what``.
    """
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
