"""The figures of one engine generation, read from `presets/engines/`: data, never branches."""

from __future__ import annotations

from functools import cache

import msgspec

from turbofit.core.errors import PackageError
from turbofit.core.model import Quantization
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.memory import versions
from turbofit.memory.shared_terms import HOPPER

__all__ = ["DeltaKernel", "EngineConstants", "PackedFormat", "load_constants"]


class PackedFormat(Struct):
    """Scales and zeros of a group in bytes, held and while loading; temporaries an element.

    ``of``: elements of the kernels' groups, which repeat the scales of larger ones.
    ``align``: channels of whose multiple each rank's experts have, where it is not the group's.
    ``input``: bytes an element of a linear's input, where the kernels take it quantised.
    """

    group: float
    load_group: float
    temporary: float
    of: int | None = None
    fused_silu: bool = False
    align: int | None = None
    input: float = 0.0

    def groups(self, elements: int, stored: int) -> int:
        """Groups of so many elements whose stored groups have so many."""
        return elements // (stored if self.of is None else min(stored, self.of))


class ExpertFormat(Struct):
    """How one kind of card holds the linears of experts, packed or at 16 bits.

    ``align``: channels of whose multiple each rank's experts have at 16 bits.
    """

    temporary: int
    align: int = 32
    fused_silu: bool = False


class DeltaKernel(Struct):
    """How one kind of card runs gated delta nets.

    ``chunk`` tokens of a prompt are worked on together, with a workspace; 0: without one.
    ``segment`` scales how many chunks a segment has. Sequences are cut into segments where there
    are at most ``cut_heads`` heads in all of them, or ``cut_long_heads`` beside a sequence of
    ``cut_long_chunks`` chunks.
    """

    dtypes: tuple[str, ...]
    chunk: int = 0
    segment: float = 0.0
    cut_heads: int = 0
    cut_long_heads: int = 0
    cut_long_chunks: int = 0


class EngineConstants(Struct):
    """What one TurboMind generation fixes, in bytes unless the name says otherwise.

    The meaning, source and sign of each figure stand beside it in the YAML file.
    """

    version: str
    pool_granularity: int
    page_size: int
    slab_fill: float
    slab_limit: int
    gemm_workspace: tuple[int, ...]
    attention_workspace_tokens: int
    max_log_probs: int
    kv_flatten_pad_tokens: int
    warmup_lengths: tuple[int, ...]
    ffn_align_16bit: int
    ffn_align_grouped: int
    vision_head_dims: dict[int, int]
    ipc_packet: int
    ipc_scratch: int
    nccl_buffers: dict[str, int]
    cublas_handles: int
    cublas_handle: dict[str, int]
    torch_kernels: int
    kernel_modules: int
    pool_growth: dict[str, float]
    packed: dict[str, dict[str, PackedFormat]]
    experts: dict[str, ExpertFormat]
    load_layer: dict[str, float]
    delta_rule: dict[str, DeltaKernel]
    host_process: int
    #: Of older generations only: the GEMM workspace that is made with the context, and the compute
    #: capabilities on which dense linears of 16 bits are prepared through a copy.
    gemm_in_context: tuple[int, ...] = ()
    copied_16bit: tuple[int, ...] = ()

    def packed_format(
        self, quantization: Quantization, capability: tuple[int, int]
    ) -> PackedFormat:
        """How a card of this compute capability holds linears that are packed so."""
        formats = self.packed.get(quantization.method, self.packed["int4"])
        return formats.get(f"{capability[0]}{capability[1]}", formats["default"])

    def expert_format(self, capability: tuple[int, int]) -> ExpertFormat:
        """How a card of this compute capability holds experts."""
        return self.experts.get(f"{capability[0]}{capability[1]}", self.experts["default"])

    def delta_kernel(self, capability: tuple[int, int]) -> DeltaKernel | None:
        """How a card of this compute capability runs gated delta nets; None where none does."""
        if capability < HOPPER:
            return self.delta_rule["before_90"]
        return self.delta_rule.get(f"{capability[0]}{capability[1]}")


@cache
def load_constants(version: str = versions.REFERENCE) -> EngineConstants:
    """The constants of a version with presets of its own, such as ``0.18``.

    Raises:
        PackageError: turbofit has no account for this generation.
    """
    path = preset_path("engines", f"turbomind-{version}")
    if not path.is_file():
        raise PackageError(
            f"turbofit has no memory account for TurboMind {version}",
            hint=f"use LMDeploy {versions.REFERENCE}",
        )
    figures = {
        key: entry["value"] if isinstance(entry, dict) else entry
        for key, entry in load_yaml(path).items()
    }
    return msgspec.convert(figures, EngineConstants, strict=False)
