"""Lines of LMDeploy's engines that `observe` has no use for: older generations, the scheduler.

Sources: LMDeploy 0.5 to 0.18 (BlockManager.cc, LlamaBatch.cc, allocator.h, scheduler.cc).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.units import MIB
from turbofit.diagnose.lines.events import (
    Computed,
    DefaultSession,
    KvBlocks,
    LegacyCuda,
    PeerMissing,
    VisionForward,
)
from turbofit.observe.turbomind_log import ServerUp

if TYPE_CHECKING:
    from turbofit.core.struct import Struct

__all__ = ["engine_line"]

_BLOCKS: Final = re.compile(
    r"(block_size|max_block_count|chunk_size) = (\d+(?:\.\d+)?)(?: MB)?\s*$"
)
_CUDA: Final = re.compile(r"CUDA runtime error: (.*?)(?:\s+(\S*\.(?:h|cc|cu|cpp|cuh):\d+))?\s*$")
_PEER: Final = re.compile(r"Devicl?e (\d+) peer access Device (\d+) is not available")
_SESSION: Final = re.compile(r"`max_context_token_num` is not set, default to (\d+)")
_SHAPE: Final = re.compile(r"vision forward shape: torch\.Size\(\[(\d+(?:, *\d+)*)\]\)")
#: vLLM, SGLang and others that serve by FastAPI.
_READY: Final = re.compile(r"Application startup complete|Available routes are:")
_COMPUTED: Final = re.compile(r"\(uid (\d+)\) .*computed \[(\d+),(\d+)\)")


def engine_line(text: str) -> Struct | None:
    """The event of one line, or None. ``block_size`` is in MiB, floored before 0.8."""
    if "computed [" in text and (match := _COMPUTED.search(text)):
        return Computed(uid=int(match[1]), start=int(match[2]), end=int(match[3]))
    if "CUDA runtime error" in text and (match := _CUDA.search(text)):
        return LegacyCuda(message=match[1], where=match[2] or "")
    if " = " in text and (match := _BLOCKS.search(text)):
        scale = MIB if match[1] == "block_size" else 1
        return KvBlocks(field=match[1], value=round(float(match[2]) * scale))
    if "peer access" in text and (match := _PEER.search(text)):
        return PeerMissing(a=int(match[1]), b=int(match[2]))
    if "vision forward shape" in text and (match := _SHAPE.search(text)):
        return VisionForward(shape=tuple(int(part) for part in match[1].split(",")))
    if "max_context_token_num" in text and (match := _SESSION.search(text)):
        return DefaultSession(tokens=int(match[1]))
    return ServerUp() if _READY.search(text) else None
