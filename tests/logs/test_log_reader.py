"""Lines in the real formats: 0.16's ``core/logger.cc`` and the strings of 0.18's binary."""

from __future__ import annotations

import pytest

from tests.support.waiting import endless_ends
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.logs import log_events as log
from turbofit.logs.log_reader import form_of, read_line
from turbofit.machine.nvidia_smi import SmiTable
from turbofit.machine.torch_memory import TorchMemory
from turbofit.memory.account import LoggedSlab
from turbofit.memory.engines import engine_named

PREFIX = "[TM][INFO][1120.08:30:01.123456][turbomind.cc:305] "
FATAL = "[TM][FATAL][1120.08:30:01.123456]"
OUT_OF_MEMORY = log.CudaError(message="out of memory")
SERVER = "2026-11-20 08:30:01,123 - lmdeploy - ERROR - "


@pytest.mark.parametrize(
    ("line", "event"),
    [
        (
            PREFIX + "Object cache budget: 16091.20 MB from free 20114.00 MB and ratio 0.800",
            log.CacheBudget(budget=16872846131, free=20114 * MIB, ratio=0.8),
        ),
        (
            "[TM][WARN][1120.08:30:01.123456][slab.h:136] "
            "slab_size 33554432, object_size 2097152, object_count 16, ratio 1",
            log.Slab(slab_size=33554432, object_size=2097152),
        ),
        (PREFIX + "Warm-up lengths: 8, 16, 8320", log.WarmupLengths()),
        (PREFIX + "8320", log.WarmupLength(tokens=8320)),
        (PREFIX + "Warm-up finished in 12.34 seconds.", log.WarmupFinished()),
        # As `serving.engine.log_file` hands it on, without its time.
        (
            "[TM][INFO][scheduler.cc:1186] out of memory at 0/1",
            log.Backpressure(cause="memory"),
        ),
        (PREFIX + "hit resource limit at 3/9", log.Backpressure(cause="limit")),
        (
            FATAL + "[allocator.cc:44] CUDA error: out of memory",
            log.CudaError(message="out of memory", call="allocator.cc:44"),
        ),
        (
            FATAL + "[allocator.cc:105] CUDA error: out of memory",
            log.CudaError(message="out of memory", call="allocator.cc:105"),
        ),
        (
            FATAL + "[measurer.cu:83] Check failed: status == cudaSuccess out of memory",
            log.CudaError(message="out of memory", call="measurer.cu:83"),
        ),
        (
            FATAL + "[cuda_ipc_comm.cu:196] CUDA Driver error: CUDA_ERROR_NOT_SUPPORTED",
            log.CudaError(
                message="CUDA_ERROR_NOT_SUPPORTED", driver=True, call="cuda_ipc_comm.cu:196"
            ),
        ),
        (
            FATAL + "[buffer.cc:25] Check failed: base + size <= size_ (9 vs. 8) ",
            log.CheckFailed(message="base + size <= size_ (9 vs. 8)"),
        ),
        (
            PREFIX + "Qwen3.5 ViT setup: mm_seqs=1 images_batched=1 images_skipped=0 patches=62208",
            log.VisionSetup(),
        ),
        (
            "[TM][WARN][1120.08:30:01.123456][turbomind.cc:123] "
            "`max_context_token_num` is not set, default to 32768.",
            log.Starting(session=32768),
        ),
        (
            "  [ 0] LlamaLinear::Forward @ src/turbomind/models/llama/LlamaLinear.cu:210",
            log.Frame(name="LlamaLinear::Forward"),
        ),
        (
            "torch.cuda.OutOfMemoryError: CUDA out of memory.",
            TorchMemory(message="CUDA out of memory."),
        ),
        (
            "RuntimeError: NCCL error /x/nccl.cu:24 'unhandled system error'",
            log.NcclError(message="NCCL error /x/nccl.cu:24 'unhandled system error'"),
        ),
        # As libstdc++ ends a process that nobody's `catch` saved.
        ("  what():  CUDA error: out of memory", OUT_OF_MEMORY),
        (
            "  what():  CUDA driver error: out of memory",
            log.CudaError(message="out of memory", driver=True),
        ),
        ("  what():  std::bad_alloc: cudaErrorMemoryAllocation: out of memory", OUT_OF_MEMORY),
        (
            "  what():  CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0",
            TorchMemory(
                message="CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0", requested=2 * MIB
            ),
        ),
        ("  what():  std::bad_alloc", None),
        (
            "AssertionError: no valid parallel config: dp=1, tp=4",
            log.PythonError(name="AssertionError", message="no valid parallel config: dp=1, tp=4"),
        ),
        (
            "2026-11-20 08:30:01,123 - lmdeploy - WARNING - archs.py:38 - "
            "Fallback to pytorch engine because turbomind is not built.",
            log.EngineFallback(
                message="Fallback to pytorch engine because turbomind is not built."
            ),
        ),
        (SERVER + "engine.py:671 - Engine main loop failed.", log.LoopFailed()),
        (SERVER + "engine_loop.py:686 - EngineLoop wait_tasks failed.", log.LoopFailed()),
        # LMDEPLOY_LOG_PID=1
        (SERVER + "[pid=7 ppid=6] - engine.py:671 - Engine main loop failed.", log.LoopFailed()),
        ("Loading weights from safetensors:   0%|          | 0/4", log.LoadingWeights()),
        ("Warming up decoding:  20%|##        | 1/5", log.WarmingUp()),
        ("RuntimeError: No enough gpu memory for kv cache.", log.NoCache(what="kv cache")),
        ("EOFError", log.LostLock()),
        ("    image_embeds = self.visual(pixel_values,", log.VisionFrame()),
        ("    self.build_cache_engine()", log.CacheFrame()),
        ("INFO:     Uvicorn running on http://127.0.0.1:23333 (Press CTRL+C)", log.ServerUp()),
    ],
)
def test_lines(line: str, event: object) -> None:
    assert (read_line(line), read_line(f"\x1b[38;2;255;000;000m{line}\x1b[0m\n")) == (event, event)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "out of memory at 0/1",
        "2026-11-20 08:30:01,123 - lmdeploy - WARNING - async_engine.py:1 - Object cache budget",
        PREFIX + "slab_size 0, object_size 0, object_count 0, ratio 0",
        'INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK',
        "a user said: RuntimeError: not ours",
        "HINT:    Please open http://127.0.0.1:23333 in a browser",
    ],
)
def test_other_lines(line: str) -> None:
    assert read_line(line) is None


@pytest.mark.parametrize(
    ("budget", "slab", "tokens"),
    [
        # InternVL2-8B at tp 1, 1712.8 MiB: the binary held 13312 or 13568 tokens by its alignment.
        (round(1712.8 * MIB), (32, 8), 13312),
        # 48 layers: objects of 12 MiB in slabs of 256.
        (1000 * MIB, (256, 12), 3 * 21 * 64),
        (31 * MIB, (32, 8), 0),
        (0, (32, 8), 0),
    ],
)
def test_tokens_from_the_log(budget: int, slab: tuple[int, int], tokens: int) -> None:
    size, block = slab[0] * MIB, slab[1] * MIB
    shape = engine_named("turbomind").logged_cache([LoggedSlab(size, block)], Settings())
    assert shape is not None
    assert shape.tokens(budget) == tokens


def test_a_long_line_takes_no_longer_than_it_is() -> None:
    assert read_line(" " * (1 << 20)) is None
    assert read_line(" self.vision" * (1 << 16)) is None


@pytest.mark.parametrize(
    "line",
    [
        "Engine main loop failed.",
        SERVER + "async_engine.py:456 - [safe_run] session 3 exception caught: bad schema"
        " 'Engine main loop failed.'",
        SERVER + "engine.py:671 - Engine main loop failed. Says somebody",
        '127.0.0.1:5 - "GET /EngineLoop%20wait_tasks%20failed. HTTP/1.1" 404',
        "ValueError: EOFError",
    ],
)
def test_a_clients_words_end_no_engine(line: str) -> None:
    assert not isinstance(read_line(line), log.LoopFailed | log.LostLock)


@pytest.mark.parametrize(
    ("read", "begins", "spaces"),
    [
        (read_line, "CUDA runtime error: ", 12_000),
        (read_line, "GPU 0: a", 16_000),
        (SmiTable().line, "| 0  a", 1_200),
        (SmiTable().line, "| 0 12 C a", 12_000),
    ],
)
def test_the_reading_of_a_line_of_spaces_ends(read, begins, spaces) -> None:
    with endless_ends():
        read(f"{begins}{' ' * spaces}!")


def test_lines_that_differ_in_figures_alone_are_asked_once() -> None:
    asked = []

    def length(form: str) -> int:
        asked.append(form)
        return len(form)

    lines = ("at 17/20", "at 93/41", "at 3/41", "7" * 1000)
    assert [form_of(line).ask(length) for line in lines] == [8, 8, 7, 1000]
    assert asked == ["at 00/00", "at 0/00", "0" * 1000]


COUNT = "[2026-02-05 17:05:17 DP0] Avg thr (in/out): 4618.5 / 27.3 tokens/s, "


@pytest.mark.parametrize(
    ("counted", "succeeded"),
    [
        ("Server (succeeded/failed/routed/waiting): 7 / 2 / 3 / -1", 7),
        ("API server (completed/routed/waiting): 9 / 3 / 0", 9),
    ],
)
def test_a_server_s_count_is_read_in_both_its_forms(counted: str, succeeded: int) -> None:
    """0.12 counts no failures; later a count falls below 0, as a run here showed."""
    line = f"{COUNT}{counted}, Engine (running/waiting): 3 / 0, KV cache: 21.6%, "
    assert read_line(line) == log.ServerFigures(succeeded=succeeded)
