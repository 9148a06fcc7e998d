"""What LMDeploy's PyTorch engine prints at WARNING, one line at a time, as typed events.

Its own figures (free memory, blocks) are INFO, which would print prompts too, so that a log tells
only how far the engine has come, and how its loop ended. The server outlives the loop, and answers
503 for ever.
Source: LMDeploy 0.18 pytorch/engine/{engine,engine_loop}.py, executor/base.py, and torch's message.
"""

from __future__ import annotations

import re
from typing import Final

from turbofit.core.struct import Struct
from turbofit.observe.turbomind_log import Event as AnyEngineEvent
from turbofit.observe.turbomind_log import parse_line

__all__ = [
    "CacheFrame", "Event", "LoadingWeights", "LoopFailed", "LostLock", "NoCache", "VisionFrame",
    "WarmingUp", "parse_pytorch_line",
]  # fmt: skip

_NO_CACHE: Final = re.compile(r".*No enough gpu memory for (kv cache|runtime)\.")
#: The engine's own record, whole: an engine is killed for it, and a message of some request's error
#: may quote what a client wrote.
_LOOP_FAILED: Final = re.compile(
    r".* - ERROR - (\[pid=[^\]]*\] - )?engine(_loop)?\.py:\d+"
    r" - (Engine main loop|EngineLoop wait_tasks) failed\.\s*$"
)
#: A line of a traceback of executor/base.py, whatever runs the ranks.
_CACHE: Final = "self.build_cache_engine()"
#: A line of a traceback inside a vision tower, as the models' own code reads.
_VISION: Final = re.compile(
    r"\s.*(self\.(visual|vision\w*|extract_feature\w*|get_image_features|multi_modal_projector)\("
    r"|pixel_values)"
)


class LoadingWeights(Struct, tag="loading_weights"):
    """The bar of the weight loader."""


class WarmingUp(Struct, tag="warming_up"):
    """The bar of the warm-up: the cache is there."""


class NoCache(Struct, tag="no_cache"):
    """Too little is free for ``what``: ``kv cache`` or ``runtime``."""

    what: str


class LoopFailed(Struct, tag="loop_failed"):
    """The engine's loop ended; what ended it follows."""


class LostLock(Struct, tag="lost_lock"):
    """The engine's process lost the lock that it shares with the server while both start."""


class VisionFrame(Struct, tag="vision_frame"):
    """A traceback passes through the vision tower."""


class CacheFrame(Struct, tag="cache_frame"):
    """A traceback passes through the allocation of the cache."""


Event = (
    AnyEngineEvent | LoadingWeights | WarmingUp | NoCache | LoopFailed | LostLock | VisionFrame
    | CacheFrame
)  # fmt: skip


def parse_pytorch_line(line: str) -> Event | None:
    """The event that one line of a log tells of, or None."""
    if "Loading weights from" in line:
        return LoadingWeights()
    if "Warming up " in line:
        return WarmingUp()
    if _LOOP_FAILED.match(line):
        return LoopFailed()
    if match := _NO_CACHE.match(line):
        return NoCache(what=match[1])
    if line.strip() == "EOFError":
        return LostLock()
    if line.strip() == _CACHE:
        return CacheFrame()
    if _VISION.match(line):
        return VisionFrame()
    return parse_line(line)
