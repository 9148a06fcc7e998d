"""GPUs whose memory is the host's too: there ``cudaMemGetInfo`` counts the page cache as used."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.struct import NA

if TYPE_CHECKING:
    from turbofit.core.machine import Gpu

__all__ = ["TEGRA", "unified_memory_note"]

#: Jetson by compute capability (developer.nvidia.com/cuda-gpus): Nano, TX2, Xavier, Orin and Thor.
TEGRA: Final = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0)})
_GB10: Final = (12, 1)
_INTEGRATED: Final = TEGRA | {_GB10}
_INTEGRATED_NAME: Final = re.compile(r"\b(gb10|jetson|tegra|xavier|orin|thor)\b", re.IGNORECASE)
#: Modules whose memory the host sees as one more NUMA node.
_NUMA_NODE: Final = re.compile(r"\b(gh200|gb200|gb300)\b", re.IGNORECASE)

_MEND: Final = "drop the cache before a start: sync; echo 3 > /proc/sys/vm/drop_caches"


def unified_memory_note(gpu: Gpu) -> str | None:
    """What page cache does to the free memory of this GPU; None where it does nothing."""
    name, capability = gpu.name, gpu.compute_capability
    if _INTEGRATED_NAME.search(name) or (capability != NA and capability in _INTEGRATED):
        return (
            f"{name} shares the host's memory, and cudaMemGetInfo counts the page cache as used:"
            f" LMDeploy's cache gets smaller with the files that were read; {_MEND}"
            " (github.com/ggml-org/llama.cpp/pull/17368)"
        )
    if _NUMA_NODE.search(name):
        return (
            f"the memory of {name} is a NUMA node of its host: the page cache may lie there, and"
            f" cudaMemGetInfo counts it as used; {_MEND}"
            " (github.com/vllm-project/vllm/issues/35313)"
        )
    return None
