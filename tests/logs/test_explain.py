"""What people paste, one kind after the other."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from tests.hostile import hostile
from tests.logs.conftest import explain, message, some, tried
from tests.support.checkpoints import make_internvl2
from turbofit.core.errors import UsageError
from turbofit.core.plan import Settings
from turbofit.core.struct import to_json
from turbofit.core.units import GIB, MIB
from turbofit.logs.causes import text_of
from turbofit.logs.explain import diagnose
from turbofit.logs.log_events import CacheBudget, Slab
from turbofit.logs.log_reader import read_line
from turbofit.memory.account import LoggedSlab
from turbofit.memory.engines import engine_named

TM = "[TM][FATAL][1120.09:18:10.597172]"
COMMAND = "$ lmdeploy serve api_server OpenGVLab/InternVL2-8B --tp 2 --communicator cuda-ipc\n"
KNOWN = [
    ("port_taken", "configuration",
     "[Errno 98] error while attempting to bind on address ('0.0.0.0', 23333): address already in "
     "use"),
    ("out_of_memory", "cache", "RuntimeError: No enough gpu memory for kv cache."),
    ("gpu_lost", "serving", "[9.1] NVRM: Xid (PCI:0000:41:00): 79, pid=1, GPU has fallen off"),
    ("shared_memory", "host RAM", "NCCL WARN Error while creating shared memory segment: No space"
     " left on device"),
    ("offload", "weights",
     "ValueError: The current `device_map` had weights offloaded to the disk. Please provide an "
     "`offload_folder` for them."),
    ("healthy", "none", "INFO:     Uvicorn running on http://0.0.0.0:23333 (Press CTRL+C to quit)"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "phase", "text"), KNOWN)
def test_known_messages(kind: str, phase: str, text: str) -> None:
    found = explain(f"a GPU server before\n{text}\nand one after\n")
    assert (found.kind, found.phase) == (kind, phase)
    assert [one.line for one in found.evidence] == [2]
    assert "{" not in found.what
    assert found.known


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "hello\nworld\n", "GET /v1/models 200\n" * 50, "\x00\xff\x1b[31m", "137\n134\n"],
)
def test_unknown_logs_say_so(text: str) -> None:
    found = explain(text)
    assert found.kind == "unknown"
    assert not found.known
    assert found.unknown == ("what happened",)


@pytest.mark.parametrize(
    ("text", "line", "sent"),
    [
        ("Traceback (most recent call last):\nValueError: the moon is full", 2, "its start"),
            ("2026-01-01 10:00:00 - lmdeploy - ERROR - the moon is full", 1, "check_env"),
        ('Traceback (most recent call last):\n  File "/p/m.py", line 3, in f\n'
         "    assert the moon is full\nAssertionError", 4, "pip list"),
    ],
)  # fmt: skip
def test_an_unknown_error_is_quoted_with_what_to_send(text: str, line: int, sent: str) -> None:
    found = explain(f"{text}\n")
    assert not found.known
    assert "the moon is full" in found.what
    assert (found.evidence[0].line, found.unknown) == (line, ("what caused it",))
    assert any(sent in line for line in found.send)


def test_an_unknown_error_names_where_it_was_raised() -> None:
    frames = "".join(f'  File "/p/m{n}.py", line {n}, in f{n}\n    f{n}()\n' for n in range(5))
    found = explain(f"Traceback (most recent call last):\n{frames}ValueError: the moon is full\n")
    assert found.why == (
        "it was raised in /p/m4.py, in f4 < /p/m3.py, in f3 < /p/m2.py, in f2",
    )  # fmt: skip


def test_the_earliest_cause_is_the_answer_and_later_ones_are_named() -> None:
    out = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."
    found = explain(f"{out}\nNCCL WARN socket error\nKilled\nNo CUDA GPUs are available\n")
    assert found.kind == "out_of_memory"
    assert [one.split(":")[0] for one in found.also] == ["line 4", "line 2", "line 3"]


def test_the_kernels_killer() -> None:
    found = explain(
        "[881.2] Memory cgroup out of memory: Killed process 2211 (python3) total-vm:81234kB, "
        "anon-rss:65536000kB, file-rss:1024kB, shmem-rss:0kB\n"
    )
    assert (found.kind, found.phase) == ("host_out_of_memory", "host RAM")
    assert "memory limit was reached" in found.what
    assert found.held[0].bytes == (65536000 + 1024) * 1024
    plain = explain("Out of memory: Killed process 9 (lmdeploy)\n")
    assert (plain.kind, "machine's RAM" in plain.what) == ("host_out_of_memory", True)


def test_cuda_ipc_without_peers() -> None:
    found = explain(
        f"{COMMAND}# 2x RTX 4090\n{TM}[cuda_ipc_comm.cu:196] CUDA error: invalid device ordinal\n"
    )
    assert message(found) == "no_peer_access"
    assert any("--communicator nccl" in one for one in tried(found))
    assert some(found.would_work).settings["communicator"] == "nccl"
    assert explain("RuntimeError: CUDA error: invalid device ordinal\n").kind == "no_such_gpu"


def test_a_plan_asks_for_what_it_lacks_and_weighs_what_no_account_covers() -> None:
    found = explain("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.\n")
    assert found.would_work is None
    assert any("--model" in line for line in found.unknown)
    assert any("--on" in line for line in found.unknown)
    found = explain("torch.OutOfMemoryError: CUDA out of memory. llava-v1.5-13b on 1x T4\n")
    assert (some(found.would_work).fits, some(found.would_work).settings) == (False, {})


def test_a_silent_hang_at_the_default_log_level() -> None:
    found = explain(
        "[TM][WARN][1120.09:18:18.178218][turbomind.cc:128] `max_context_token_num` is not set, "
        "default to 32768.\n[TM][WARN][1120.09:18:18.271140][slab.h:136] slab_size 33554432, "
        "object_size 8388608, object_count 4, ratio 1\n"
    )
    assert (found.kind, message(found)) == ("unknown", "stands_still")
    assert some(found.others).had[1] == text_of("warm-up waits")


def hang(budget: float, ratio: float, **extra: Any) -> str:
    free = budget / ratio
    head = "[TM][INFO][1120.09:18:10.597172]"
    return (
        f"{head}[turbomind.cc:338] Object cache budget: {budget:.2f} MB from free {free:.2f} MB and"
        f" ratio {ratio:.3f}\n[TM][WARN][1120.09:18:18.2][slab.h:136] slab_size 33554432, "
        f"object_size 8388608, object_count 4, ratio 1\n{head}[turbomind.cc:440] Warm-up lengths: "
        "8, 16, 8192, 8320\n" + f"{head}[scheduler.cc:1186] out of memory at 0/1\n" * 5000
    )


def test_the_hang_and_its_missing_blocks() -> None:
    found = explain(hang(856.4, 0.1))
    assert found.kind == "start_hang"
    # By the account the first of 26 pages of 32 MiB begins late: 100 blocks of 8; 8320 need 130.
    assert some(found.missing).bytes == (130 - 100) * 8 * MIB
    # 33 slabs of 32 MiB, and one for the alignment, of 8564 MiB.
    assert any("to 0.128 at least" in one for one in found.changes)
    assert any("nothing can be admitted" in one.tells for one in found.evidence)
    large = explain(hang(4000, 0.8))  # its cache would hold the request
    assert (large.kind, message(large)) == ("unknown", "start_hang")


def test_torch_text_of_2_0() -> None:
    found = explain(
        "RuntimeError: CUDA out of memory. Tried to allocate 192.00 MiB (GPU 0; 23.69 GiB total "
        "capacity; 22.10 GiB already allocated; 34.75 MiB free; 22.40 GiB reserved in total by "
        "PyTorch) If reserved memory is >> allocated memory try setting max_split_size_mb\n"
    )
    assert some(found.missing).bytes == 192 * MIB - round(34.75 * MIB)
    assert "fragmentation" in " ".join(found.why)
    assert found.held[0].bytes == int(22.40 * GIB)


SHARDS = "Loading checkpoint shards: {}%|{}| {}/2 [00:02<00:00,  1.00s/it]\n"
LOAD = SHARDS.format(0, "", 0) + SHARDS.format(100, "##", 2)
OUT = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.\n"


@pytest.mark.parametrize(
    ("log", "twice"),
    [
        (LOAD + OUT, False),
        (LOAD + SHARDS.format(100, "##", 2) + OUT, False),
        (LOAD * 2 + OUT, True),
        (f"$ torchrun --nproc_per_node=2 x.py\n{LOAD * 2}{OUT}", False),
        (f"$ torchrun --nproc_per_node=2 x.py\n{LOAD * 4}{OUT}", True),
    ],
)
def test_a_model_that_is_loaded_twice(log: str, twice: bool) -> None:
    """Not a bar that is drawn again at its end, nor one of each rank."""
    found = explain(log)
    assert any("loaded the whole model" in one for one in found.why) == twice
    assert any(one.startswith("load the model once") for one in found.changes) == twice


def test_of_more_free_than_asked_nothing_is_said_to_be_missing() -> None:
    found = explain(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 38.00 MiB. GPU 0 \nhas a "
        "total capacity of 23.65 GiB of which 39.44 MiB is \nfree. Process 11 has 1.81 GiB memory "
        "in use.\n"
    )
    assert some(found.missing).bytes is None


HEAD = "[1120.10:13:27.30"
BUDGET = (
    f"[TM][INFO]{HEAD}8315][turbomind.cc:338] Object cache budget: 7067.38 MB from free 7175.00 MB "
    f"and ratio 0.985\n[TM][WARN]{HEAD}8400][slab.h:136] slab_size 33554432, object_size 3670016, "
    "object_count 9, ratio 0.984375\n"
)
FATAL = (
    "[TM][FATAL][1120.10:13:27.308500][allocator.cc:49] CUDA error: out of memory\n"
    "*** stacktrace of thread 0x7fcc614ad6c0 ***\n  [ 0] TM_CUDA_CHECK @ gemm.cu:50\n"
)


def test_what_lacks_is_forecast_for_the_release_of_the_log() -> None:
    command = "$ lmdeploy serve api_server OpenGVLab/InternVL3-8B  # RTX 3090\n"
    found = explain(command + BUDGET + FATAL)
    assert some(found.missing).bytes is None
    assert (some(found.missing_in_all).bytes or 0) > 0
    assert any("0.18 is assumed" in one for one in found.unknown)
    found = explain(f"lmdeploy==0.16.0\n{command}{BUDGET}{FATAL}")
    assert not any("assumed" in one for one in found.unknown)


def sized(budget: float, free: float, *lines: str) -> str:
    """A log of 0.18 whose cache took ``budget`` MiB of ``free``."""
    told = (f"[turbomind.cc:338] Object cache budget: {budget:.2f} MB from free {free:.2f} MB and "
            f"ratio {budget / free:.3f}", *lines)  # fmt: skip
    return "".join(f"[TM][INFO]{HEAD}8315]{line}\n" for line in told)


def warming(longest: int) -> str:
    return f"[turbomind.cc:440] Warm-up lengths: 8, 16, 1024, {longest}"


IMAGE = ("[turbomind.cc:492] Warm-up finished in 0.01 seconds.",
         "[qwenvit.cc:230] Qwen3.5 ViT setup: mm_seqs=1 images_batched=1 images_skipped=0 "
         "patches=40000")  # fmt: skip


#: Deaths of the 0.18.0 binary on pretend 3090s: model, tp, batch, prefill, session; the cache and
#: what was free; later lines; where it died by the account, and MiB that the step lacked.
DEATHS = [
    ("internvl2-26b-awq", (2, 200, 12288, 32768), (9647.2, 9725), (), "right after the cache", 210),
    ("internvl2-2b", (1, 128, 1024, 32768), (18411.06, 18485), (), "right after the cache", 38),
    ("qwen2-vl-7b", (1, 256, 4096, 16384), (6056.42, 6443), (warming(4352),), "own warm-up", 157),
    ("qwen2.5-7b", (2, 256, 8192, 16384), (15985, 16278), (warming(8448),), "own warm-up", 318),
    ("qwen2-vl-7b", (2, 128, 1024, 16384), (14642.2, 15189), (warming(1152), *IMAGE), "aborts on",
     313),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "cache", "lines", "where", "lacked"), DEATHS)
def test_what_lacks_in_all_is_no_less_than_what_a_step_lacked(
    model: str,
    options: tuple[int, int, int, int],
    cache: tuple[float, float],
    lines: tuple[str, ...],
    where: str,
    lacked: int,
) -> None:
    """As `predict` says it of what was free: all that the settings let in, not the step alone."""
    names = ("tp", "max-batch-size", "max-prefill-token-num", "session-len")
    words = " ".join(f"--{name} {value}" for name, value in zip(names, options, strict=True))
    command = f"$ lmdeploy serve api_server {model} {words}\n"
    found = explain(f"{command}{sized(*cache, *lines)}{FATAL}", on=f"{options[0]}xrtx3090")
    assert where in found.why[-1]
    assert lacked <= (some(found.missing_in_all).bytes or 0) / MIB < lacked + 2200
    few = sized(cache[1] * 0.4, cache[1] * 0.9, *lines)
    granted = explain(f"{command}{few}{FATAL}", on=f"{options[0]}xrtx3090")
    assert granted.missing_in_all is None
    assert any("what took the rest" in one for one in granted.unknown)


STACK = "*** stacktrace of thread 0x1 ***\n  [ 0] TM_CUDA_CHECK @ a.cc:1\n  [ 1] {} @ b.cc:2\n"
WARMING = f"{TM}[turbomind.cc:440] Warm-up lengths: 8, 16\n"


def test_page_locked_memory_is_told_from_a_gpus() -> None:
    text = f"{TM}[allocator.cc:105] CUDA error: out of memory\n"
    log = COMMAND + WARMING + text + STACK.format("InternVit::Impl::Setup()")
    found = explain(f"lmdeploy==0.18.0\n{log}")
    assert (found.kind, found.phase) == ("host_out_of_memory", "host RAM")
    assert "warm-up (in InternVit::Impl" in found.what
    # The line is of that release: of a log without a version it proves nothing.
    assert (explain(log).kind, message(explain(log))) == ("unknown", "host_out_of_memory")
    # Another version has another line there.
    assert explain("lmdeploy==0.17.0\n" + WARMING + text).kind == "out_of_memory"


def test_nobody_is_blamed_where_the_load_fits_an_empty_card() -> None:
    text = f"{TM}[allocator.cc:49] CUDA error: out of memory\n"
    found = explain("$ lmdeploy serve api_server internvl2-1b\n" + text, on="1xrtx3090")
    assert found.phase == "weights"
    assert "somebody" not in " ".join((found.what, *found.why))
    assert any("these settings leave room" in one for one in found.unknown)


THROWN = "terminate called after throwing an instance of 'std::runtime_error'\n  what():  {}\n"


OLD = "[TM][ERROR] CUDA runtime error: out of memory /lmdeploy/src/turbomind/utils/"
GUARDED = f"{TM}[measurer.cu:83] Check failed: status == cudaSuccess out of memory\n"
DRIVER = THROWN.format("CUDA driver error: out of memory")
THRUST = THROWN.format("parallel_for failed: cudaErrorMemoryAllocation: out of memory")


@pytest.mark.parametrize(
    ("log", "phase"),
    [
        (FATAL, "unknown"),  # the log begins later than the engine
        (COMMAND + FATAL, "weights"),
        (BUDGET + FATAL, "cache"),
        (FATAL + BUDGET, "cache"),  # a fatal line overtakes the logger
        # A cache's workspaces may be made while the warm-up is announced.
        (COMMAND + WARMING + FATAL + STACK.format("Impl::InternalThreadEntry()"), "cache"),
        (COMMAND + WARMING + GUARDED + STACK.format("LlamaLinear::Forward()"), "warm-up"),
        (f"{COMMAND}{DRIVER}Aborted (core dumped)\n", "weights"),
        (BUDGET + THRUST, "cache"),
        (f"RuntimeError: {OLD}memory_utils.cu:32", "weights"),
        (f"terminate called\n  what():  {OLD}allocator.h:233", "unknown"),
    ],
)
def test_the_phase_is_what_the_log_shows(log: str, phase: str) -> None:
    found = explain(log)
    assert (found.kind, found.phase) == ("out_of_memory", phase)


UP = "INFO:     Uvicorn running on http://0.0.0.0:23333 (Press CTRL+C to quit)\n"
WAITING = "Waiting for creating a placement group of specs for 10 seconds. specs=[{}]\n"


@pytest.mark.parametrize(
    "warning",
    [
        WAITING,
        "h:1:1 [0] misc/cudawrap.cc:36 NCCL WARN Cuda failure 3 'initialization error'\n",
        "Unable to register remote classes used by trust_remote_code with by-value serialization."
        " If remote code is not needed remove `--trust-remote-code`\n",
    ],
)
def test_what_an_engine_warns_of_and_outlives_is_no_cause(warning: str) -> None:
    assert explain(warning + UP).kind == "healthy"
    assert explain(f"{warning}{OUT}").kind == "out_of_memory"


def test_a_wait_without_an_end_is_the_cause() -> None:
    assert message(explain(WAITING)) == "ray_waits"
    assert message(explain(f"{WAITING}Killed\n")) == "ray_waits"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('"OOMKilled": false,\n"ExitCode": 0,', "unknown"),
        ('"OOMKilled": false,\n"ExitCode": 134,', "aborted"),
        ('"OOMKilled": true,\n"ExitCode": 137,', "killed"),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/psm_12ab'", "shared_memory"),
        ("Bus error (core dumped)", "shared_memory"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 687194767"
         " bytes.", "host_out_of_memory"),
        ("MemoryError", "host_out_of_memory"),
        (f"{THROWN.format('std::bad_alloc')}Aborted", "host_out_of_memory"),
        ("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled cuda"
         " error\nLast error:\nCuda failure 2 'out of memory'", "out_of_memory"),
    ],
)  # fmt: skip
def test_which_memory_it_was(text: str, kind: str) -> None:
    assert message(explain(f"$ lmdeploy\n{text}\n")) == kind


def test_the_command_names_the_folder_that_was_asked_about(tmp_path: Path) -> None:
    folder = make_internvl2(tmp_path / "my model")
    found = explain(COMMAND + FATAL, model=str(folder), on="1xrtx3090")
    words = shlex.split(some(found.would_work).command)
    assert words[:3] == ["turbofit", "serve", str(folder)]
    assert "--max-dynamic-patch" in words


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{UP}2026-11-23 12:00:00,1 - lmdeploy - REQUEST - logger.py:32 - session=3, prompt='Why"
         " CUDA out of memory. Tried to allocate 2.00 GiB? --tp 4 qwen2-vl-7b Killed'", "healthy"),
        ("HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/api/models/a",
         "no_access"),
        ("ValueError: Port 23333 is not available", "port_taken"),
    ],
)  # fmt: skip
def test_words_that_several_causes_share(text: str, kind: str) -> None:
    assert message(explain(f"$ lmdeploy\n{text}\n")) == kind


def _run(*news: str) -> str:
    """A start of an engine at LMDeploy's INFO, at the default's times."""
    return "".join((COMMAND, "Loading:   0%|          | 0/24 [00:00<?, ?it/s]\n", *news))


WARMED = f"{WARMING}{TM}[turbomind.cc:492] Warm-up finished in 0.01 seconds.\n"


@pytest.mark.parametrize(
    ("runs", "phase"),
    [
        ([(BUDGET, WARMED, UP), (FATAL,)], "weights"),
        ([(BUDGET, WARMED, UP), (BUDGET, FATAL)], "cache"),
        ([(BUDGET, WARMING, FATAL), (BUDGET, WARMED, UP)], "warm-up"),
        ([(BUDGET, WARMED, UP), (BUDGET, WARMED, UP, FATAL)], "text"),
        ([(BUDGET, WARMED, UP)] * 40 + [(FATAL,)] + [(BUDGET, WARMED, UP)] * 3, "weights"),
    ],
)
def test_the_phase_is_that_of_the_run_that_died(runs: list[tuple[str, ...]], phase: str) -> None:
    """An engine that its supervisor started again was said to die where the first run had been."""
    text = "# 2x RTX 3090\n" + "".join(_run(*news) for news in runs)
    found = explain(text)
    assert (found.kind, found.phase, found.read.machine) == ("out_of_memory", phase, "2xrtx3090")
    assert found.read.lines == text.count("\n")


def test_a_restart_without_its_command_is_told_by_what_it_prints() -> None:
    loading = "Loading:   0%|          | 0/24 [00:00<?, ?it/s]"
    assert explain(_run(BUDGET, WARMED, UP) + loading + FATAL).phase == "weights"


@hostile("logs")
def test_lines_become_events_or_nothing(data: bytes) -> None:
    budget: CacheBudget | None = None
    for text in data.decode("utf-8", "replace").splitlines():
        event = read_line(text)
        budget = event if isinstance(event, CacheBudget) else budget
        if budget and isinstance(event, Slab):
            slabs = [LoggedSlab(event.slab_size, event.object_size)]
            shape = engine_named("turbomind").logged_cache(slabs, Settings())
            assert shape is not None
            assert shape.tokens(budget.budget) >= 0


@hostile("diagnose", examples=40)
def test_there_is_always_an_answer(data: bytes) -> None:
    with suppress(UsageError):  # a model or a machine that cannot be meant
        to_json(diagnose([data]))


LOADING: Final = (
    "# InternVL2-40B, {}\n2025-02-11 09:14:02,311 - lmdeploy - INFO - Using turbomind engine\n"
    "RuntimeError: [TM][ERROR] CUDA runtime error: out of memory"
    " /lmdeploy/src/turbomind/utils/memory_utils.cu:32\n"
)


def test_a_plan_for_the_machine_on_which_loading_died_is_no_promise() -> None:
    advice = some(explain(LOADING.format("A100 80G")).would_work)
    assert advice.fits is None
    assert advice.note == text_of("loaded here")
    on_two = some(explain(LOADING.format("2x A100 80G")).would_work)
    assert (on_two.fits, on_two.settings["tp"]) == (True, 2)


COUNT: Final = (
    "[2026-08-19 10:20:{} DP0] Avg thr (in/out): 0.4 / {} tokens/s, Server (succeeded/failed/"
    "routed/waiting): 16 / 0 / 25 / 0, Engine (running/waiting): {} / 0, KV cache: 3.1%, \n"
)


def test_a_server_stands_still_where_the_user_says_so() -> None:
    log = UP + COUNT.format("05", "512.3", 8) + COUNT.format("15", "0.0", 9)
    assert explain(log).kind == "healthy"
    found = explain(log, hang=True)
    assert message(found) == "stands_still"
    assert any("py-spy dump" in text for text in found.send)
    assert message(explain(log + OUT, hang=True)) == "out_of_memory"


@pytest.mark.parametrize(
    ("log", "engine"),
    [('File "/v/vllm/engine/core.py", line 1, in run\n' + OUT, "vLLM"),
     ("python -m sglang.launch_server --model-path m\n" + OUT, "SGLang")],
)  # fmt: skip
def test_a_log_of_another_engine_is_named(log: str, engine: str) -> None:
    found = explain(log)
    assert engine in found.what
    assert (found.kind, found.changes, found.read.engine) == ("unknown", (), engine.lower())


CLEANED: Final = """\
2025-04-22 14:02:11,120 - lmdeploy - ERROR - engine.py:781 - Task <EngineMainLoop> failed
Traceback (most recent call last):
  File "/v/lmdeploy/pytorch/engine/engine.py", line 829, in async_loop
    self._loop_finally()
  File "/v/lmdeploy/pytorch/engine/executor/ray_executor.py", line 308, in release
    self.collective_rpc('exit')
AttributeError: 'ActorHandle' object has no attribute 'exit'
"""


def test_the_error_of_a_clean_up_is_not_the_error() -> None:
    found = explain(CLEANED)
    assert not found.known
    assert "package" not in message(found)
    assert message(explain(OUT + CLEANED)) == "out_of_memory"
    alone = explain(CLEANED.partition("\n")[2])
    assert alone.why[-1] == text_of("cleans up")
