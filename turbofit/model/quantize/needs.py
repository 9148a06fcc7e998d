"""Counts what llm-compressor takes of a card, of host memory and of the disk, before it runs.

llm-compressor's sequential pipeline holds one decoder layer on the card. GPTQ sums a Hessian in
float32 for each linear layer, inputs x inputs, and then solves one linear layer after the other.
The formulas follow its code, release 0.14.0.1: `modifiers/gptq/helpers.py` and
`pipelines/sequential`. ``bench/quantize`` holds them against that code on pretend GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.struct import Struct
from turbofit.core.units import FLOAT, GIB, HALF, MIB
from turbofit.model.drafts import with_draft
from turbofit.model.parameters import stored_bytes
from turbofit.model.quantize.scheme import Scheme, packed_linears
from turbofit.model.tensors import Tensor, elements, text_tensors
from turbofit.model.towers import tower_tensors

#: The side of the square that the program makes of each picture, in pixels.
PICTURE_SIDE: Final = 448
#: The copies of a Hessian while torch inverts it, and their cuSOLVER workspace: 1/1,024 of one.
_COPIES: Final = 4
_WORKSPACE: Final = 1024
#: What torch's pool holds beyond its tensors, with segments that expand: at least so many bytes and
#: this share. Llama-3.1-8B lived with 163 MiB on pretend GPUs, and died with 124 MiB.
_POOL: Final = 192 * MIB
_POOL_SHARE: Final = 0.03
#: Copies of a sample's states that a layer and its neighbours hold.
_STATES: Final = 4
#: Copies in float32 of a linear layer's inputs while its Hessian grows, seen with 14,336 inputs.
_INPUTS: Final = 4
#: Rows of logits in float32 in the program's loss: three copies of 256.
_LOSS_ROWS: Final = 3 * 256
#: The program's modules, libraries and file headers in host memory.
_PROCESS: Final = 3 * GIB
#: Bytes of a score in attention that is computed in the open, which `calibration_forward_context`
#: forces: 16 bits, and float32 before and after the softmax, as allocated on pretend GPUs.
_SCORE: Final = HALF + 2 * FLOAT
#: Tensors as wide as the queries beside them: queries, and keys and values of every head.
_HEADS: Final = 3
#: The draft whose layers the program copies: tensors of ``mtp.``.
_MTP: Final = "qwen3_5_mtp"
#: Samples and tokens that `lmdeploy lite auto_awq` takes if nobody says otherwise. Source:
#: lmdeploy lite/apis/auto_awq.py::auto_awq #8be456
AWQ_SAMPLES: Final = 128
AWQ_TOKENS: Final = 2048
#: Language models that it takes. Source: lmdeploy lite/apis/calibrate.py::LAYER_TYPE_MAP #3e2555
_AWQ_TAKES: Final = frozenset(
    {
        "InternLM2ForCausalLM", "InternLM3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "MixtralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
        "Qwen3MoeForCausalLM", "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    }
)  # fmt: skip


#: A vision model of which it takes the language model out.
_BY_LANGUAGE_MODEL: Final = "InternVLChatModel"


class Needs(Struct):
    """What a quantisation takes, in bytes; ``card`` is without the process's CUDA context.

    ``card_terms`` are the parts of the card's peak, by name. ``disk`` is the result's size;
    ``source`` that of the checkpoint, which must lie on a disk as well.
    """

    samples: int
    tokens: int
    card: int
    card_terms: dict[str, int]
    host: int
    host_terms: dict[str, int]
    disk: int
    source: int


class AwqNeeds(Struct):
    """What ``lmdeploy lite auto_awq`` takes of a card, in bytes; ``why_not``: it refuses the model.

    It sends all samples through the model at once, so the card's peak grows with their tokens.
    """

    card: int = 0
    samples: int = AWQ_SAMPLES
    tokens: int = AWQ_TOKENS
    why_not: str = ""


def needs_of(model: Model, scheme: Scheme, samples: int, tokens: int) -> Needs:
    """Count the peak of the card and of host memory, for ``samples`` of ``tokens`` tokens each."""
    card = _largest(
        (_layers_peak(model, scheme, tokens), _towers_peak(model), _loss_peak(model, tokens))
    )
    card["pool"] = max(_POOL, int(sum(card.values()) * _POOL_SHARE)) + _holes(model, tokens)
    host = {
        "model": model.parameters * HALF,
        "samples": (samples + 1) * _sample_bytes(model, tokens),
        "process": _PROCESS,
    }
    copied = _copied_bytes(model)
    return Needs(
        samples=samples,
        tokens=tokens,
        card=sum(card.values()),
        card_terms=card,
        host=sum(host.values()),
        host_terms=host,
        disk=stored_bytes(model.text, model.vision, "bfloat16", scheme.quantization) + copied,
        source=model.weight_bytes + copied,
    )


def _holes(model: Model, tokens: int) -> int:
    """Return what torch's pool may hold idle between the Hessians of experts.

    Beside those of each expert a hole stays that is smaller than the expert's activations: 121 of 2
    MiB were seen of 128 experts, whose activations have 3 MiB.
    """
    moe = model.text.moe
    return 0 if moe is None else moe.experts * tokens * moe.intermediate * HALF


def _copied_bytes(model: Model) -> int:
    """Return the bytes of the layers that propose tokens, which the program copies in 16 bits.

    A model's weight bytes are without them. A linear layer joins a token's embedding and its state,
    after a norm of each.
    """
    try:
        draft = with_draft(model, _MTP, None, None).draft
    except UsageError:
        return 0
    assert draft
    layers = [one for one in text_tensors(draft.text) if one.part not in ("embedding", "head")]
    joins, norms = 2 * draft.text.hidden, 2
    return (elements(layers) + (joins + norms) * draft.text.hidden) * HALF


def awq_needs(model: Model, samples: int = AWQ_SAMPLES, tokens: int = AWQ_TOKENS) -> AwqNeeds:
    """Count what LMDeploy's own tool takes; four public logs agree within 0.5 %.

    lmdeploy#1418, #1729, #2079 and #2873 print the memory at the layer or die at the last norm.
    """
    text = model.text
    alone = model.vision is None or model.architecture == _BY_LANGUAGE_MODEL
    kind = text.architecture if alone else model.architecture
    if kind not in _AWQ_TAKES:
        return AwqNeeds(why_not=f"it does not take {model.architecture}")
    states = samples * tokens * text.hidden * HALF
    layer = max(elements(_tensors_of(model, n)) for n in _kinds(model)) * HALF
    embedding = text.vocab * text.hidden * HALF
    card = embedding + max(4 * states + layer, 6 * states)
    return AwqNeeds(card=card, samples=samples, tokens=tokens)


def _kinds(model: Model) -> list[int]:
    """Return the number of one layer of each kind: layers of a kind have the same tensors."""
    seen: dict[tuple[str, ...], int] = {}
    for layer in range(model.text.layers):
        seen[tuple(tensor.role for tensor in _tensors_of(model, layer))] = layer
    return [*seen.values()]


def _tensors_of(model: Model, layer: int) -> list[Tensor]:
    """Return the tensors of one layer, each as if the model had this layer alone."""
    tensors = [one for one in text_tensors(model.text) if one.layers and layer in one.layers]
    return [replace(tensor, layers=(layer,)) for tensor in tensors]


def _layers_peak(model: Model, scheme: Scheme, tokens: int) -> dict[str, int]:
    """Return the card's largest peak over all kinds of decoder layers.

    llm-compressor runs no head while it calibrates.
    """
    linears = packed_linears(model)
    peaks = []
    for layer in _kinds(model):
        packed = [one for one in linears if layer in (one.layers or ())]
        weights = elements(_tensors_of(model, layer)) * HALF
        resident = {
            "layer": weights + weights * 3 // (2 * scheme.group_size),
            "states": _STATES * tokens * model.text.hidden * HALF + tokens * tokens * HALF,
        }
        phases = (_solving(packed), *_calibrating(model, packed, tokens))
        peaks += [resident | phase for phase in phases]
    return _largest(peaks)


def _largest(phases: Sequence[dict[str, int]]) -> dict[str, int]:
    return max(phases, key=lambda terms: sum(terms.values()))


def _solving(linears: Sequence[Tensor]) -> dict[str, int]:
    """Return the card's peak while GPTQ solves a layer's linear layers, one after the other.

    The Hessians of the linear layers that are still to come wait on the card. Of the previous
    linear layer the result in float32 is still held.
    """
    single = [tensor for tensor in linears for _ in range(tensor.copies)]
    waiting = sum(map(_hessian, single))
    phases, before = [{"hessians": 0}], 0
    for linear in single:
        waiting -= _hessian(linear)
        work = linear.shape[0] * linear.shape[1] * FLOAT
        inverse = _COPIES * _hessian(linear) + _hessian(linear) // _WORKSPACE
        phases.append({"hessians": waiting, "inverse": inverse, "float32 weights": before + work})
        before = work
    return _largest(phases)


def _calibrating(model: Model, linears: Sequence[Tensor], tokens: int) -> Iterator[dict[str, int]]:
    """Yield the card's peaks while one sample passes a layer: in attention, and at each Hessian."""
    hessians = sum(_hessian(one) * one.copies for one in linears)
    text = model.text
    each = tokens * (tokens * _SCORE + _HEADS * text.head_dim * HALF)
    yield {"hessians": hessians, "attention": text.heads * each}
    for linear in linears:
        inputs = linear.shape[1] * tokens
        sums = _hessian(linear) + _INPUTS * inputs * FLOAT
        yield {"hessians": hessians, "sums": sums, "activations": 3 * inputs * HALF}


def _loss_peak(model: Model, tokens: int) -> dict[str, int]:
    """Return the card's peak while the program measures the loss, before and after."""
    text = model.text
    return {
        "head": text.vocab * text.hidden * HALF,
        "logits": 2 * tokens * text.vocab * HALF + _LOSS_ROWS * text.vocab * FLOAT,
    }


def _hessian(linear: Tensor) -> int:
    return linear.shape[1] ** 2 * FLOAT


def _towers_peak(model: Model) -> dict[str, int]:
    """Return the card's peak before the first layer: embeddings, towers and one picture."""
    text, vision = model.text, model.vision
    terms = {"embeddings": text.vocab * text.hidden * HALF}
    if vision is not None:
        patches = ((vision.image_size or PICTURE_SIDE) // vision.patch_size) ** 2 + 1
        terms["towers"] = elements(tower_tensors(vision, text.hidden)) * HALF
        terms["picture"] = patches * (patches * vision.heads * _SCORE + 8 * vision.hidden * FLOAT)
    return terms


def _sample_bytes(model: Model, tokens: int) -> int:
    """Return the bytes of host memory for one sample between two layers.

    What a layer writes takes the place of what it read, so the states of one sample are held twice.
    A mask over pairs of tokens and the rotary embedding stay for all layers. llm-compressor's own
    ``IntermediatesCache.size()`` is 65.9 MiB for 16 samples of Qwen2.5-0.5B, and this is 68.0.
    """
    text = model.text
    states = tokens * text.hidden * HALF
    places = 3 if model.vision is not None else 1  # of Qwen2-VL's kind: time, height and width
    rotary = 2 * places * tokens * text.head_dim * HALF
    return states + tokens * tokens * HALF + rotary + _pixel_bytes(model)


def _pixel_bytes(model: Model) -> int:
    """Return the bytes of the preprocessed picture of a sample, in float32."""
    if model.vision is None or model.image_rule is None:
        return 0
    units = 1
    if model.image_rule.unit_name == "patch":
        units = (PICTURE_SIDE // model.vision.patch_size) ** 2
    return model.pixel_bytes(units) * FLOAT // HALF
