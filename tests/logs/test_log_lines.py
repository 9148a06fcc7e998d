"""Single lines: what is read from them, and that nothing makes the readers fail."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from turbofit.core.units import MIB
from turbofit.logs import facts, log_reader, subject
from turbofit.logs.causes import hits_of
from turbofit.logs.log_events import (
    KvBlocks,
    LegacyCuda,
    PeerMissing,
    PythonFrame,
    Starting,
)
from turbofit.logs.log_reader import log_lines, read_line
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


@given(st.binary(max_size=400), st.integers(2, 50))
def test_any_bytes_in_any_pieces_are_read(data: bytes, size: int) -> None:
    assume(data[:2] not in (b"\xff\xfe", b"\xfe\xff"))  # UTF-16's mark
    whole = list(log_lines([data]))
    assert list(log_lines([data[at : at + size] for at in range(0, len(data), size)])) == whole


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
    "_BEGINS_AGAIN", "_LOADS", "_COMPLAINT", "_PROGRESS", "_GOES_ON", "_COMMENT", "_IN_WORDS",
    "_OF_FACTS", "_LMDEPLOY", "_OTHERS", "_QUANTISES", "_PYTORCH", "_OPTION", "_AUTO_MAP",
    "_VERSION", "_VARIABLE", "MAY_BE_CARD",
)  # fmt: skip


def test_a_figure_in_a_message_s_words_counts() -> None:
    """Lines of one form are asked once, and told apart."""
    lines = [f"cudaGetDeviceCount() failed: Error {number}: x" for number in (801, 803, 804)]
    kinds = [[hit.row.kind for hit in hits_of(line)] for line in lines]
    assert kinds == [[], ["driver_mismatch"], ["driver_too_old"]]
