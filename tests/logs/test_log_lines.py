"""Single lines: what is read from them, and that nothing makes the readers fail."""

from __future__ import annotations

import re
from itertools import starmap

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.logs.conftest import explain
from turbofit.core.units import MIB
from turbofit.logs import facts, log_reader, subject
from turbofit.logs.causes import hits_of
from turbofit.logs.facts import read_runs
from turbofit.logs.log_events import (
    KvBlocks,
    LegacyCuda,
    PeerMissing,
    PythonFrame,
    Starting,
)
from turbofit.logs.log_reader import LogLine, form_of, log_lines, read_line
from turbofit.logs.subject import Subject
from turbofit.machine.torch_memory import TorchMemory
from turbofit.model.names import families


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("[TM][INFO] [BlockManager] block_size = 2 MB",
         KvBlocks(field="block_size", value=2 * MIB)),
        ("[TM][INFO] [BlockManager] max_block_count = 6214",
         KvBlocks(field="max_block_count", value=6214)),
        ("[TM][ERROR] CUDA runtime error: out of memory /lmdeploy/src/x/allocator.h:246",
         LegacyCuda(message="out of memory", where="/lmdeploy/src/x/allocator.h:246")),
        ("RuntimeError: [TM][ERROR] CUDA runtime error: out of memory /a/b.cu:31 ",
         LegacyCuda(message="out of memory", where="/a/b.cu:31")),
        ("[TM][WARNING] Devicle 0 peer access Device 3 is not available.", PeerMissing(a=0, b=3)),
        ("[TM][WARNING] Device 1 peer access Device 0 is not available.", PeerMissing(a=1, b=0)),
        ("`max_context_token_num` is not set, default to 32768.", Starting(session=32768)),
        ("nothing", None),
        ("torch.cuda.OutOfMemoryError: Allocation on device 0",
         TorchMemory(message="Allocation on device 0")),
    ],
)  # fmt: skip
def test_engine_lines(text: str, event: object) -> None:
    assert read_line(text) == event


@pytest.mark.parametrize(
    "text",
    [
        '  File "/venv/vllm/llm.py", line 214, in __init__',
        "File /venv/vllm/llm.py:214, in __init__(self, model)",
        "File [/venv/vllm/llm.py:214](http://localhost/llm.py#line=213), in __init__(self, model)",
        "│ /venv/vllm/llm.py:214 in __init__                      │",
        "/venv/vllm/llm.py in __init__(self, model)",
        '  File "/venv/vllm/llm.py", line 214 in __init__',
    ],
)
def test_frames_of_python_of_notebooks_and_of_rich(text: str) -> None:
    assert read_line(text) == PythonFrame(path="/venv/vllm/llm.py", function="__init__")


@pytest.mark.parametrize(
    "prefix",
    [
        "ERROR 05-21 13:04:20 engine.py:389] ",
        "(EngineCore_DP0 pid=936) ERROR 10-31 10:58:27 [core.py:779] ",
        "(VllmWorker rank=1 pid=5) ERROR 04-16 11:12:31 [multiproc_executor.py:380] ",
        "2024-06-10 17:54:07 | ERROR | stderr | ",
        "llava-1  | 2024-06-27 11:10:22,420 - lmdeploy - ERROR - ",
        "Nov  3 12:00:00.123456 gpu-node-1 turbofit@a.service[4242]: ",
        "2026-11-23T12:00:00+0000 gpu-node-1 turbofit[4242]: ",
        "[pod/llava-0/server] 2026-11-23T12:00:00.123456789Z ",
        "2026-11-23T12:00:00.123456789Z stderr F ",
        "3: ",
    ],
)
def test_what_servers_put_before_an_error(prefix: str) -> None:
    error = "ValueError: x"
    assert [row[:2] for row in log_lines([f"{prefix}{error}\n".encode()])] == [(1, error)]


def test_rows_clean_what_terminals_and_launchers_add() -> None:
    text = (
        "\x1b[31mred\x1b[0m\n"
        "Loading: 1%\rLoading: 2%[TM][FATAL][1120.09:18:02][a.cc:1] CUDA error: out of memory\n"
        "(RayWorker pid=12, ip=10.0.0.1) torch.OutOfMemoryError: CUDA out of memory.\n"
        "[rank3]: RuntimeError: [TM][ERROR] CUDA runtime error: x y.cu:1\n"
        "web-1  | Killed\n\n"
    )
    assert [row[:2] for row in log_lines([text.encode()])] == [
        (1, "red"),
        (2, "Loading: 1%"),
        (2, "Loading: 2%"),
        (2, "[TM][FATAL][1120.09:18:02][a.cc:1] CUDA error: out of memory"),
        (3, "torch.OutOfMemoryError: CUDA out of memory."),
        (4, "RuntimeError: [TM][ERROR] CUDA runtime error: x y.cu:1"),
        (5, "Killed"),
    ]
    assert list(log_lines(["a\nb".encode("utf-16")])) == [(1, "a"), (2, "b")]


def test_what_every_run_says_of_the_machine_is_not_multiplied_by_the_runs() -> None:
    """A log of 3 MB took 1 GB: each of 3000 runs had the lines of all of them."""
    run = [
        "max_context_token_num",
        "max_block_count = 9",
        "Device 0 peer access Device 1 is not ",
    ]
    run[2] += "available"
    found = read_runs(starmap(LogLine, enumerate(run * 200, 1)))
    assert sum(len(one.marks) for one in found) < 200 * 40
    assert found[-1].subject.lines == 600


@given(st.binary(max_size=400), st.integers(2, 50))
def test_any_bytes_in_any_pieces_are_read(data: bytes, size: int) -> None:
    assume(data[:2] not in (b"\xff\xfe", b"\xfe\xff"))  # UTF-16's mark
    whole = list(log_lines([data]))
    assert list(log_lines([data[at : at + size] for at in range(0, len(data), size)])) == whole


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("lmdeploy serve api_server OpenGVLab/InternVL2-8B --tp 4", "internvl2-8b"),
        ("pipe = pipeline('/data/models/Qwen2-VL-7B-Instruct/')", "qwen2-vl-7b"),
        ("--model-path liuhaotian/llava-v1.5-7b", "llava-1.5-7b"),
        ("running InternVL2_26B-AWQ today", "internvl2-26b-awq"),
        ("import modeling_llama", None),
    ],
)
def test_models_that_logs_name(text: str, model: str | None) -> None:
    subject = Subject()
    subject.read(1, text, form_of(text))
    assert subject.model == model


def test_a_command_goes_before_a_mention() -> None:
    subject = Subject()
    mention = "compared with Qwen2-VL-7B-Instruct"
    command = "lmdeploy serve api_server internvl2-8b --tp 2 --quant-policy 8 --dtype float16"
    for line, text in enumerate((mention, command), 1):
        subject.read(line, text, form_of(text))
    assert subject.model == "internvl2-8b"
    assert subject.options == {"tp": 2, "quant_policy": 8, "dtype": "float16"}


ANSWERS = """\
INFO:     client - "POST /v1/chat/completions HTTP/1.1" 200 OK
[2026-11-27 21:44:15 DP0] Avg thr (in/out): 9319.6 / 86.3 tokens/s, Server \
(succeeded/failed/routed/waiting): 36 / FAILED / 1 / 0, Engine (running/waiting): 1 / 0, KV cache: \
7.0%,
INFO:     client - "POST /v1/chat/completions HTTP/1.1" 200 OK
"""


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("failed", [0, 30])
def test_a_count_of_requests_is_no_error(failed: int, numbered: bool) -> None:
    """A line that LMDeploy prints every ten seconds; a log may begin later than its engine."""
    log = ANSWERS.replace("FAILED", str(failed))
    if numbered:  # as `grep -n` prints it
        log = "".join(f"{n}:{row}\n" for n, row in enumerate(log.splitlines(), 58))
    found = explain(log)
    assert (found.kind, found.phase) == ("healthy", "none")
    broken = explain(f"{log}ERROR: the disk went away\n")
    assert broken.kind == "unknown"
    assert "the disk went away" in broken.what


def test_questions_about_a_line_s_form_name_no_figure() -> None:
    """`Form` asks them of the line with zeros: a figure in a pattern would not be found."""
    asked = [
        one.__self__ if hasattr(one, "__self__") else one
        for module in (facts, subject)
        for name, one in vars(module).items()
        if name in _ASKED
    ]
    assert len(asked) == len(_ASKED)
    for pattern in (*asked, *subject._MODEL):
        assert not re.search("[1-9]", re.sub(r"\{\d+(,\d*)?\}", "", pattern.pattern)), pattern
    words = [word for row in (*log_reader._TURBOMIND, *log_reader._OTHER) for word in row.words]
    assert not re.search("[1-9]", " ".join((*words, *families())))


_ASKED = (
    "_BEGINS_AGAIN", "_LOADS", "_COMPLAINT", "_PROGRESS", "_GOES_ON", "_COMMENT", "IN_WORDS",
    "_OF_FACTS", "_LMDEPLOY", "_OTHERS", "_QUANTISES", "_PYTORCH", "_OPTION", "_AUTO_MAP",
    "_VERSION", "_VARIABLE", "MAY_BE_CARD",
)  # fmt: skip


def test_a_figure_in_a_message_s_words_counts() -> None:
    """Lines of one form are asked once, and told apart."""
    lines = [f"cudaGetDeviceCount() failed: Error {number}: x" for number in (801, 803, 804)]
    kinds = [[hit.row.kind for hit in hits_of(line)] for line in lines]
    assert kinds == [[], ["driver_mismatch"], ["driver_too_old"]]
