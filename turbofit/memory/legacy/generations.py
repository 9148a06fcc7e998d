"""Generations of LMDeploy before 0.18 (`presets/engines/generations.yaml`), with their weights.

The rules of a generation are data; no code depends on a version. An entry of the file gives only
the fields that differ from the previous entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Literal, TypeVar

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import PackageError
from turbofit.core.model import Model, Quantization
from turbofit.core.presets import load_yaml, merged, preset_path
from turbofit.core.struct import JsonObject, Struct
from turbofit.core.units import HALF, round_up
from turbofit.memory.turbomind.weights import EngineConstants, weight_classes
from turbofit.memory.versions import FIRST_CURRENT, is_legacy, parse
from turbofit.model.tensors import elements
from turbofit.model.towers import vision_tensors


class CacheRule(Struct, forbid_unknown_fields=True):
    """The size of the cache in one generation.

    ``of``: the ratio is a share of the ``free`` memory after the weights (the least in the group),
    or of the ``total`` memory, or a number of whole sessions (``slots``). ``default`` is the
    default ratio. ``objects``: the cache is one region of pages as in 0.18; if not, it consists of
    blocks. ``after_buffers``: the persistent buffers are allocated before the cache. ``grows``:
    only requests allocate the cache, block by block. ``online_scales``: quantised keys and values
    have a scale and a zero point for each token and head. ``bits`` are the bits of a key's or
    value's element, by ``quant_policy``.
    """

    of: Literal["free", "total", "slots"]
    default: float
    block_tokens: int
    bits: dict[int, int]
    online_scales: bool
    grows: bool
    after_buffers: bool
    objects: bool
    truncates_session: bool


class VisionRule(Struct, forbid_unknown_fields=True):
    """The vision tower: the program that runs the tower, the time of its load, and its GPUs."""

    runs: Literal["none", "torch", "native"]
    loaded: Literal["before_cache", "after_cache"]
    placed: Literal["first", "balanced"]
    copies: dict[str, float] = msgspec.field(default_factory=lambda: {"default": 1.0})
    pinned_pixels: bool = False

    def copies_of(self, architecture: str) -> float:
        """Return torch's memory after loading, as a multiple of the float16 tower's size."""
        named = (size for name, size in self.copies.items() if architecture.startswith(name))
        return next(named, self.copies["default"])


class BufferRule(Struct, forbid_unknown_fields=True):
    """Sizes of the persistent buffers; `generations.yaml` describes each."""

    hidden: int
    kv_copies: int
    token_ids: int
    logits: int
    log_probs: int
    attention_tokens: int
    attention_extra: int
    split_rows: int


class StagingRule(Struct, forbid_unknown_fields=True):
    """Torch's memory on the first GPU while tensors move to the engine.

    ``embedding``, ``gate`` and ``square`` are the numbers of 16-bit copies of three matrices; if
    ``shared``, the embedding is only a rank's part. ``packed`` replaces ``gate`` and ``square`` for
    4-bit weights, unless it is 0. If ``kept``, torch still holds this memory when the engine reads
    the free memory.
    """

    embedding: int
    gate: float
    square: float
    packed: float
    shared: bool
    kept: bool


class _Entry(Struct, forbid_unknown_fields=True):
    """The fields of both engines' entries; ``first`` is the first version of the generation.

    ``batch`` has the default batch sizes by a part of the GPU's name (`account.batch_size`).
    ``head_dims`` are the channels that a head may have; None: the engine's own tables decide.
    """

    first: str
    head_dims: tuple[int, ...] | None
    source: dict[str, str]
    batch: dict[str, int]
    prefill: int
    kv_heads: Literal["divided", "asserted", "multiples", "any"]
    packed: dict[str, tuple[int, ...]]

    def reads(self, packed: Quantization | None) -> bool:
        """Return whether this generation can load weights with this quantisation."""
        return packed is None or packed.group_size in self.packed.get(packed.method, ())

    def kv_heads_problem(self, kv_heads: int, tp: int) -> str | None:
        """Return why ``tp`` ranks can neither divide nor repeat the KV heads, or None."""
        rule = self.kv_heads
        if rule == "any" or kv_heads % tp == 0 or (rule == "multiples" and tp % kv_heads == 0):
            return None
        if rule == "multiples":
            return f"repeats {kv_heads} KV heads only over a multiple of {kv_heads} ranks, not {tp}"
        return (
            f"repeats no KV heads (0.6.5 and newer do): {kv_heads} KV heads over {tp} ranks"
            f" end in {'a floating point exception' if rule == 'divided' else 'an assertion'}"
        )


class Generation(_Entry):
    """One generation of TurboMind; the YAML file of all generations has the sources."""

    cache: CacheRule
    embeddings: Literal["replicated", "sharded"]
    vision: VisionRule
    forward: Literal["session", "prefill"]
    iteration: Literal["session", "prefill"]
    context_sessions: int
    buffers: BufferRule
    gemm_before: tuple[int, ...]
    aliased: bool
    warmup: Literal["none", "tuning", "forward", "requests"]
    first_layers: tuple[str, ...]
    staging: StagingRule
    ffn_align: int | None
    power_of_two: bool
    copied_16bit: tuple[int, ...] = ()


class RuntimeRule(Struct, forbid_unknown_fields=True):
    """Memory reserved before the ratio: bytes × vocabulary × (prefill + ``batch_rows`` × batch)."""

    bytes: int
    batch_rows: int


class LogitsRule(Struct, forbid_unknown_fields=True):
    """The logits of a prefill: of ``all`` tokens, or of the ``last`` token of each sequence.

    ``bytes`` are those of one logit with all its copies.
    """

    tokens: Literal["all", "last"]
    bytes: int


class TorchGeneration(_Entry):
    """One generation of the PyTorch engine; ``tower``: the part that contains the vision tower.

    ``ratio`` is the default share of the free memory that becomes the cache.
    """

    ratio: float
    runtime: RuntimeRule
    tower: Literal["front_end", "engine"]
    logits: LogitsRule
    block_tokens: int


_Either = TypeVar("_Either", bound=_Entry)


class LegacyConstants(Struct):
    """Figures that LMDeploy does not determine; they are equal in all generations."""

    vision_attention: dict[str, int]
    torch_block: dict[str, int]
    pool_growth: int
    tuning_tokens: tuple[int, ...]


def generation_of(version: str) -> Generation:
    """Return TurboMind's generation of a version such as ``0.6`` or ``0.5.2.post1``.

    Raises:
        PackageError: the text is not a version, or the version has its own account.
    """
    return _nearest(version, generations())


def torch_generation_of(version: str) -> TorchGeneration:
    """Return the PyTorch engine's generation of a version."""
    return _nearest(version, torch_generations())


def quantization_problem(engine: str, version: str, packed: Quantization | None) -> str | None:
    """Return why a version of an engine cannot read weights with this quantisation, or None."""
    what = f"read {packed.method} weights in groups of {packed.group_size}" if packed else ""
    return _lacking(engine, version, what, lambda entry: entry.reads(packed))


def heads_problem(engine: str, version: str, head_dim: int) -> str | None:
    """Return why a version of an engine has no attention for heads of a size, or None."""
    what = f"have attention for heads of {head_dim} channels"
    return _lacking(
        engine, version, what, lambda entry: not entry.head_dims or head_dim in entry.head_dims
    )


def _lacking(engine: str, version: str, what: str, can: Callable[[_Entry], bool]) -> str | None:
    """Return that a version of an engine does not do something, and which first did; else None."""
    of_engine = {"turbomind": generations, "pytorch": torch_generations}
    known: Sequence[_Entry] = of_engine[engine]()
    if can(_nearest(version, known)):
        return None
    came = next((f", which came with {entry.first}" for entry in known if can(entry)), "")
    return f"the {engine} engine of LMDeploy {version} does not {what}{came}"


def _nearest(version: str, known: Sequence[_Either]) -> _Either:
    """Return the last generation that begins at or before a version, or the oldest generation."""
    wanted = parse(version)
    if wanted is None or not is_legacy(version):
        raise PackageError(
            f"{version!r} is not a version of LMDeploy before {FIRST_CURRENT}",
            hint="write it like 0.6.3",
        )
    begun = [entry for entry in known if (parse(entry.first) or (0, 0, 0)) <= wanted]
    return begun[-1] if begun else known[0]


@cache
def generations() -> tuple[Generation, ...]:
    """Return TurboMind's generations, oldest first."""
    return tuple(_read("generations", Generation))


@cache
def torch_generations() -> tuple[TorchGeneration, ...]:
    """Return the PyTorch engine's generations, oldest first."""
    return tuple(_read("pytorch", TorchGeneration))


def _read(key: str, type_: type[_Either]) -> Iterator[_Either]:
    whole: JsonObject = {}
    for entry in load_yaml(preset_path("engines", "generations"))[key]:
        whole = merged({**whole, "source": {}}, entry)
        yield msgspec.convert(whole, type_, strict=False)


@cache
def legacy_constants() -> LegacyConstants:
    """Read the figures that are equal in all generations."""
    entries = load_yaml(preset_path("engines", "generations"))["constants"]
    values = {key: entry["value"] for key, entry in entries.items()}
    return msgspec.convert(values, LegacyConstants, strict=False)


def older_layouts(constants: EngineConstants, generation: Generation) -> EngineConstants:
    """Return the constants with a generation's padding of MLPs and experts, equal on all cards.

    From 0.14 on, LMDeploy pads nothing at tp 1; there the figure is too high by up to 31 channels.
    Hopper's own 4-bit layout exists only since 0.18: the binary of 0.17.0 has no plan for the
    layout.
    """
    align, int4 = generation.ffn_align or 1, constants.packed["int4"]
    plain = replace(int4["90"], group=int4["default"].group, of=None, fused_silu=False, align=None)
    return replace(
        constants,
        packed={**constants.packed, "int4": {**int4, "90": plain}},
        ffn_align_16bit=align,
        ffn_align_grouped=align,
        experts={card: replace(layout, align=align) for card, layout in constants.experts.items()},
    )


def legacy_weight_classes(
    model: Model, tp: int, constants: EngineConstants, generation: Generation
) -> dict[str, int]:
    """Return the bytes per rank of each tensor class, without the vision tower; equal on all cards.

    Before 0.6, every rank held the whole embedding and lm_head, with rows padded to a multiple of
    ``tp``.
    """
    older = older_layouts(constants, generation)
    classes = weight_classes(replace(model, vision=None), tp, older)
    if generation.embeddings == "replicated":
        whole = round_up(model.text.vocab, tp) * model.text.hidden * HALF
        classes |= {"embedding": whole, "lm_head": whole}
    return classes


# A vision tower that torch runs inside the server: float16 weights, and memory kept after an image.
#
# LMDeploy 0.2.6 to 0.15 builds the checkpoint's own tower in Python. Torch's caching allocator
# keeps the memory of the largest batch of images, for good and outside TurboMind's pool.


def tower_bytes(model: Model, tp: int, *, spread: bool) -> tuple[int, ...]:
    """Return the bytes of the tower on each GPU of the group, rounded as torch's allocator rounds.

    ``spread``: whole layers are spread over the group (accelerate's ``device_map="auto"``), with
    embeddings on the first GPU and the projector on the last. If not ``spread``, the whole tower is
    on the first GPU.
    """
    vision, page = model.vision, legacy_constants().torch_block["page"]
    if vision is None:
        return tuple([0] * tp)
    hidden, inter = vision.hidden, vision.intermediate
    mlp = [hidden * inter] * (3 if vision.gated_mlp else 2)
    small = 8 * hidden + inter  # norms, biases, layer scales
    layer = [size * HALF for size in (3 * hidden * hidden, hidden * hidden, *mlp, small)]
    total = elements(vision_tensors(vision, model.text.hidden)) * HALF
    ranks = tp if spread else 1
    shares = [vision.layers // ranks + (i < vision.layers % ranks) for i in range(ranks)]
    sizes = [_torch_bytes(layer * share) for share in shares]
    sizes[-1] += max(0, total - sum(layer) * vision.layers)
    return (*(round_up(size, page) for size in sizes), *(0,) * (tp - ranks))


def tower_activations(model: Model, units: int, *, flash: bool) -> int:
    """Return the peak bytes of a tower's forward over ``units`` (tiles or patches); 0: no tower.

    ``flash``: the tower's attention stores no score matrix, as when the requirements of the model's
    project are installed. If not ``flash``, two score matrices (before and after softmax) of all
    units at once count, which is an upper end.
    """
    vision, rule = model.vision, model.image_rule
    if vision is None or rule is None:
        return 0
    tokens = model.unit_tower_tokens
    pixels = vision.channels * vision.temporal_patch * HALF * rule.unit_side**2
    hidden = tokens * vision.hidden * HALF
    attention = hidden * legacy_constants().vision_attention["flash" if flash else "eager"]
    if not flash:
        # A tile attends to its own tokens, a patch to all patches of the request.
        attention += 2 * vision.heads * tokens * (units if rule.whole_image else tokens) * HALF
    wide = tokens * vision.intermediate * HALF
    mlp = 2 * hidden + (3 if vision.gated_mlp else 2) * wide
    return units * (pixels + max(attention, mlp))


def _torch_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes that torch's allocator maps for tensors of these sizes.

    Small tensors share pages.
    """
    block = legacy_constants().torch_block
    large = sum(round_up(size, block["page"]) for size in sizes if size >= block["large"])
    middle = sum(size for size in sizes if block["small"] < size < block["large"])
    small = sum(size for size in sizes if size <= block["small"])
    return large + round_up(middle, block["segment"]) + round_up(small, block["page"])
