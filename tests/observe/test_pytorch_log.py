"""Lines of the PyTorch engine in LMDeploy 0.18's own format, and what looks like them."""

from __future__ import annotations

import pytest

from turbofit.observe.pytorch_log import (
    CacheFrame,
    LoadingWeights,
    LoopFailed,
    LostLock,
    NoCache,
    VisionFrame,
    WarmingUp,
    parse_pytorch_line,
)

PREFIX = "2026-11-20 08:30:01,123 - lmdeploy - ERROR - "


@pytest.mark.parametrize(
    ("line", "event"),
    [
        (PREFIX + "engine.py:671 - Engine main loop failed.", LoopFailed()),
        (PREFIX + "engine_loop.py:686 - EngineLoop wait_tasks failed.", LoopFailed()),
        # LMDEPLOY_LOG_PID=1
        (PREFIX + "[pid=7 ppid=6] - engine.py:671 - Engine main loop failed.", LoopFailed()),
        ("Loading weights from safetensors:   0%|          | 0/4", LoadingWeights()),
        ("Warming up decoding:  20%|##        | 1/5", WarmingUp()),
        ("RuntimeError: No enough gpu memory for kv cache.", NoCache(what="kv cache")),
        ("EOFError", LostLock()),
        ("    image_embeds = self.visual(pixel_values,", VisionFrame()),
        ("    self.build_cache_engine()", CacheFrame()),
    ],
)
def test_what_the_engine_prints(line: str, event: object) -> None:
    assert parse_pytorch_line(line) == event


def test_a_long_line_takes_no_longer_than_it_is() -> None:
    assert parse_pytorch_line(" " * (1 << 20)) is None
    assert parse_pytorch_line(" self.vision" * (1 << 16)) is None


@pytest.mark.parametrize(
    "line",
    [
        "Engine main loop failed.",
        PREFIX + "async_engine.py:456 - [safe_run] session 3 exception caught: bad schema"
        " 'Engine main loop failed.'",
        PREFIX + "engine.py:671 - Engine main loop failed. Says somebody",
        '127.0.0.1:5 - "GET /EngineLoop%20wait_tasks%20failed. HTTP/1.1" 404',
        "ValueError: EOFError",
    ],
)
def test_a_clients_words_end_no_engine(line: str) -> None:
    assert not isinstance(parse_pytorch_line(line), LoopFailed | LostLock)
