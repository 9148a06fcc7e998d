"""TurboMind's generations before 0.18, read from `presets/engines/generations.yaml`.

Data, never branches on a version: what an entry of the file does not say, the entry before it does.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from turbofit.core.errors import PackageError
from turbofit.core.model import Quantization
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory.versions import FIRST_CURRENT, is_legacy, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class CacheRule(Struct, forbid_unknown_fields=True):
    """How the cache is sized.

    ``of`` is what a ratio is taken of: ``free`` after the weights (the least of the group),
    ``total``, or ``slots``: whole sessions, ``default`` of them. ``objects``: one region of pages
    as in 0.18, else blocks. ``after_buffers``: the persistent buffers come first.
    ``online_scales``: quantised keys and values carry a scale and a zero for each token and head.
    ``bits`` of an element by ``quant_policy``.
    """

    of: Literal["free", "total", "slots"]
    default: float
    block_tokens: int
    bits: dict[int, int]
    online_scales: bool
    after_buffers: bool
    objects: bool
    truncates_session: bool


class VisionRule(Struct, forbid_unknown_fields=True):
    """Who runs the vision tower, when it is loaded, and on which GPUs of the group."""

    runs: Literal["none", "torch", "native"]
    loaded: Literal["before_cache", "after_cache"]
    placed: Literal["first", "balanced"]
    copies: dict[str, float] = msgspec.field(default_factory=lambda: {"default": 1.0})
    pinned_pixels: bool = False

    def copies_of(self, architecture: str) -> float:
        """What torch's allocator holds after loading, in sizes of the float16 tower."""
        named = (size for name, size in self.copies.items() if architecture.startswith(name))
        return next(named, self.copies["default"])


class BatchRule(Struct, forbid_unknown_fields=True):
    """``max_batch_size`` where none is given, by a part of the GPU's name."""

    default: int
    by_name: dict[str, int]


class BufferRule(Struct, forbid_unknown_fields=True):
    """Sizes of the persistent buffers; the meaning of each stands beside it in the file."""

    hidden: int
    kv_copies: int
    token_ids: int
    logits: int
    log_probs: int
    attention_tokens: int
    attention_extra: int
    split_rows: int


class PoolRule(Struct, forbid_unknown_fields=True):
    """``aliased``: attention and feed-forward share memory, else each keeps its own buffers."""

    aliased: bool


class StagingRule(Struct, forbid_unknown_fields=True):
    """What torch holds on the first GPU while tensors are moved; ``kept`` until free is read."""

    embedding: int
    gate: int
    square: int
    kept: bool


class _Entry(Struct, forbid_unknown_fields=True):
    """What entries of both engines say; ``first`` is the version that began the generation."""

    first: str
    source: dict[str, str]
    batch: BatchRule
    prefill: int
    kv_heads: Literal["divided", "asserted", "multiples", "any"]
    packed: dict[str, tuple[int, ...]]

    def batch_size(self, gpu_name: str) -> int:
        """``max_batch_size`` where none is given."""
        name, batch = gpu_name.lower(), self.batch
        return next((size for part, size in batch.by_name.items() if part in name), batch.default)

    def reads(self, packed: Quantization) -> bool:
        """Whether weights that are quantised so can be loaded."""
        return packed.group_size in self.packed.get(packed.method, ())

    def undealt(self, kv_heads: int, tp: int) -> str | None:
        """Why KV heads are not dealt to ranks; None where they are, or 0.18 says the same."""
        rule = self.kv_heads
        if rule == "any" or kv_heads % tp == 0 or (rule == "multiples" and tp % kv_heads == 0):
            return None
        if rule == "multiples":
            return f"repeats {kv_heads} KV heads only over a multiple of them, not over {tp} ranks"
        ends = "a floating point exception" if rule == "divided" else "an assertion"
        return (
            f"repeats no KV heads, as 0.6.5 and newer do: with {kv_heads} of them over {tp} ranks"
            f" it ends in {ends}"
        )


class Generation(_Entry):
    """One generation of TurboMind. See the file for the sources."""

    cache: CacheRule
    embeddings: Literal["replicated", "sharded"]
    vision: VisionRule
    forward: Literal["session", "prefill"]
    iteration: Literal["session", "prefill"]
    context_sessions: int
    buffers: BufferRule
    gemm_before: tuple[int, ...]
    pool: PoolRule
    warmup: Literal["none", "tuning", "forward", "requests"]
    first_layers: tuple[str, ...]
    staging: StagingRule
    ffn_align: int | None
    power_of_two: bool
    copied_16bit: tuple[int, ...] = ()


class RuntimeRule(Struct, forbid_unknown_fields=True):
    """Memory set aside before the ratio: ``bytes`` × vocabulary × (prefill + rows × batch)."""

    bytes: int
    batch_rows: int


class LogitsRule(Struct, forbid_unknown_fields=True):
    """Logits of a prefill: of which tokens, and bytes of an entry with its copies."""

    tokens: Literal["all", "last"]
    bytes: int


class TorchGeneration(_Entry):
    """One generation of the PyTorch engine; ``tower``: whose model the vision tower is part of."""

    runtime: RuntimeRule
    tower: Literal["front_end", "engine"]
    logits: LogitsRule
    block_tokens: int


_Either = TypeVar("_Either", bound=_Entry)


class LegacyConstants(Struct):
    """Figures that no version of LMDeploy fixes, the same for every generation."""

    vision_attention: dict[str, int]
    torch_block: dict[str, int]
    pool_growth: int
    tuning_tokens: tuple[int, ...]


def generation_of(version: str) -> Generation:
    """TurboMind's generation of a version such as ``0.6`` or ``0.5.2.post1``.

    Raises:
        PackageError: not a version, or one that has an account of its own.
    """
    return _nearest(version, generations())


def torch_generation_of(version: str) -> TorchGeneration:
    """The PyTorch engine's generation of a version.

    Raises:
        PackageError: not a version, or one that has an account of its own.
    """
    return _nearest(version, torch_generations())


def unread(engine: str, version: str, packed: Quantization) -> str | None:
    """Why a version of an engine does not read weights that are quantised so."""
    of_engine = {"turbomind": generations, "pytorch": torch_generations}
    known: Sequence[_Entry] = of_engine[engine]()
    if _nearest(version, known).reads(packed):
        return None
    came = next((entry.first for entry in known if entry.reads(packed)), None)
    return (
        f"the {engine} engine of LMDeploy {version} does not read {packed.method} weights in groups"
        f" of {packed.group_size}" + (f", which came with {came}" if came else "")
    )


def _nearest(version: str, known: Sequence[_Either]) -> _Either:
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
    """TurboMind's, oldest first."""
    return tuple(_read("generations", Generation))


@cache
def torch_generations() -> tuple[TorchGeneration, ...]:
    """The PyTorch engine's, oldest first."""
    return tuple(_read("pytorch", TorchGeneration))


def _read(key: str, type_: type[_Either]) -> Iterator[_Either]:
    """Entries of the file, each over the ones before it."""
    whole: dict[str, Any] = {}
    for entry in _file()[key]:
        whole = _merged(whole, entry)
        yield msgspec.convert(whole, type_, strict=False)


@cache
def legacy_constants() -> LegacyConstants:
    """The figures under ``constants`` in the file."""
    values = {key: entry["value"] for key, entry in _file()["constants"].items()}
    return msgspec.convert(values, LegacyConstants, strict=False)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, one mapping inside another alike."""
    whole = dict(old)
    for key, value in new.items():
        deep = isinstance(value, dict) and isinstance(whole.get(key), dict) and key != "source"
        whole[key] = _merged(whole[key], value) if deep else value
    return whole


@cache
def _file() -> dict[str, Any]:
    return load_yaml(preset_path("engines", "generations"))
