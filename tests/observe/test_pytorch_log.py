"""Lines of LMDeploy 0.18's PyTorch engine, as a server prints them at WARNING."""

from __future__ import annotations

import pytest

from turbofit.observe.pytorch_log import (
    LoadingWeights,
    LoopFailed,
    LostLock,
    NoCache,
    VisionFrame,
    WarmingUp,
    parse_pytorch_line,
)
from turbofit.observe.turbomind_log import PythonError, ServerUp, TorchOutOfMemory

HEAD = "2026-11-20 15:21:22,051 - lmdeploy - ERROR - "


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("Loading weights from safetensors:   0%|          | 0/4 [00:00<?, ?it/s]", LoadingWeights),
        ("Warming up decoding: 100%|##########| 4/4 [00:00<00:00,  6.31it/s]", WarmingUp),
        (HEAD + "engine_loop.py:686 - EngineLoop wait_tasks failed.", LoopFailed),
        (HEAD + "engine.py:671 - Engine main loop failed.", LoopFailed),
        ("RuntimeError: No enough gpu memory for kv cache.", NoCache),
        ("    image_embeds = self.visual(pixel_values, cu_seqlens=vis_cu_seqlens)", VisionFrame),
        ("    vit_embeds = self.extract_feature(pixel_values)", VisionFrame),
        ("EOFError", LostLock),
        ("INFO:     Uvicorn running on http://127.0.0.1:23555 (Press CTRL+C to quit)", ServerUp),
        ("ValueError: something else", PythonError),
    ],
)
def test_lines(line: str, event: type) -> None:
    assert isinstance(parse_pytorch_line(line), event)


def test_torch_s_message_says_how_much_was_asked() -> None:
    line = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB. GPU 0 has"
    event = parse_pytorch_line(line)
    assert isinstance(event, TorchOutOfMemory)
    assert event.asked == 640 << 20


@pytest.mark.parametrize(
    "line", ["", 'INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK', "    return self.fc2(x)"]
)
def test_the_rest_says_nothing(line: str) -> None:
    assert parse_pytorch_line(line) is None
