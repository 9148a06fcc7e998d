"""How a model is packed to 4 bits so that TurboMind reads it: groups, and what stays in 16 bits.

The PyTorch engine reads compressed-tensors for Kimi-K2.5's experts only, so TurboMind is the engine
of every checkpoint that is made here (`families.engines`).
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Dtype, Model, Quantization
from turbofit.core.struct import Struct
from turbofit.model.families.engines import engine_problem, only_its_code
from turbofit.model.parameters import stored_bytes
from turbofit.model.presets import four_bit_variant
from turbofit.model.tensors import Tensor, text_tensors

#: Group sizes of compressed-tensors that TurboMind reads, the smaller checkpoint first. Source:
#: lmdeploy turbomind/converter.py::_SUPPORTED_GROUP_SIZES #6f4cfa
GROUPS: Final = (128, 32)
BITS: Final = 4
_HEAD: Final = "lm_head"
#: Towers, projectors and what joins them to the decoder, by the names in Transformers' classes.
_TOWERS: Final = "re:.*(visual|vision|audio|projector|mlp1|merger).*"
#: Routers, and the gate of a shared expert.
_ROUTERS: Final = ("re:.*mlp[.]gate$", "re:.*shared_expert_gate$")
#: TurboMind joins a delta net's input projections, and makes 16 bits of all where one has 16 bits.
#: Source: lmdeploy builders/deltanet.py::DeltaNetBuilder.add_input_projections #072ae7
_DELTA: Final = "re:.*linear_attn[.]in_proj.*"
#: The roles of those projections.
_DELTA_ROLES: Final = ("delta.qkv", "delta.z")
#: Models of whose experts TurboMind reads other names than llm-compressor writes, which are
#: ``experts.0.gate_proj``, ``up_proj`` and ``down_proj`` of each expert. Source:
#: lmdeploy turbomind/models/mixtral.py::MixtralModel.ffn #be4f98
#: lmdeploy turbomind/models/gpt_oss.py::GptOssModel._packed_moe_ffn #6575b1
_READ_EXPERTS: Final = {
    "MixtralForCausalLM": "w1, w3 and w2",
    "GptOssForCausalLM": "the stacked gate_up_proj and down_proj",
}


def dtype_in_16_bits(model: Model) -> Dtype:
    """Return the type in which a model is loaded to be packed: its own, if that has 16 bits."""
    return "bfloat16" if model.dtype == "float32" else model.dtype


class Scheme(Struct):
    """How weights are packed: symmetric integers of ``bits`` bits in groups of ``group_size``.

    ``ignore`` are the modules that stay in 16 bits, by compressed-tensors' names and expressions.
    """

    engine: str = "turbomind"
    bits: int = BITS
    group_size: int
    symmetric: bool = True
    ignore: tuple[str, ...]

    @property
    def quantization(self) -> Quantization:
        """The packing as the checkpoint's config will tell it."""
        return Quantization(
            method="compressed-tensors",
            bits=self.bits,
            group_size=self.group_size,
            unconverted=self.ignore,
        )


def scheme_for(model: Model) -> Scheme:
    """Choose the packing of a 16-bit model.

    Raises:
        UsageError: the model is quantised already, Transformers cannot load it, or no engine of
            LMDeploy would read the result.
    """
    if model.quantization is not None:
        raise UsageError(
            f"{model.name} is quantised already: {model.quantization.method}",
            hint="name the 16-bit checkpoint that it was made from",
        )
    if only_its_code(model):
        other_format = (
            "name the same model in the Transformers format, as InternVL3-8B-hf is of"
            " InternVL3-8B, or make AWQ with lmdeploy lite auto_awq"
        )
        raise UsageError(
            f"llm-compressor loads models by Transformers' classes, and {model.architecture} is"
            " defined by the checkpoint's own code alone",
            hint="; or ".join(filter(None, (published(model), other_format))),
        )
    if read := _READ_EXPERTS.get(model.text.architecture):
        raise UsageError(
            "llm-compressor writes each expert's gate_proj, up_proj and down_proj, and TurboMind"
            f" reads {read} of {model.text.architecture}",
            hint=_instead(model),
        )
    for size in GROUPS:
        scheme = Scheme(group_size=size, ignore=_ignored(model))
        packed = replace(model, quantization=scheme.quantization)
        problem = engine_problem(packed, scheme.engine)
        if problem is None:
            return scheme
    other = engine_problem(packed, "pytorch")
    raise UsageError(
        f"no engine of LMDeploy would read {model.name} in compressed-tensors: {problem}; {other}",
        hint=_instead(model),
    )


def published(model: Model) -> str:
    """Say which published checkpoint has 4-bit weights of a model; empty if none is known."""
    packed = four_bit_variant(model)
    return f"{packed.hub_id or packed.name} has 4-bit weights of this model" if packed else ""


def packed_model(model: Model) -> Model | None:
    """Return the model as its quantised checkpoint would be; None if it cannot be made."""
    try:
        packing = scheme_for(model).quantization
    except UsageError:
        return None
    dtype = dtype_in_16_bits(model)
    return replace(
        model,
        dtype=dtype,
        quantization=packing,
        weight_bytes=stored_bytes(model.text, model.vision, dtype, packing),
        tensor_bytes={},
        source=replace(model.source, sizes="formula"),
    )


def packed_linears(model: Model) -> list[Tensor]:
    """Return the linear layers that are packed, in the order in which a layer runs them."""
    linears = [
        tensor
        for tensor in text_tensors(model.text)
        if tensor.packs and tensor.role not in _DELTA_ROLES
    ]
    return sorted(linears, key=lambda tensor: tensor.part not in ("attention", "delta"))


def _ignored(model: Model) -> tuple[str, ...]:
    ignored = [_HEAD]
    if model.vision is not None:
        ignored.append(_TOWERS)
    if model.text.moe is not None:
        ignored += _ROUTERS
    if model.text.delta is not None:
        ignored.append(_DELTA)
    return tuple(ignored)


def _instead(model: Model) -> str:
    """Return what to do for a model whose 4 bits TurboMind does not read."""
    if instead := published(model):
        return instead
    awq = replace(model, quantization=Quantization(method="awq", bits=BITS, group_size=128))
    problem = engine_problem(awq, "pytorch")
    if problem is None:
        return (
            "LMDeploy's PyTorch engine reads this model in AWQ (gemm, groups of 128): take a"
            " published one"
        )
    return "take FP8 or a published checkpoint, or a smaller model: turbofit which --on SPEC"
