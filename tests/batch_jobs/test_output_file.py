"""The output and its lines; what is known of an input before anything is sent."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from tests.batch_jobs.standin import items_of
from turbofit.batch_jobs import output_file
from turbofit.batch_jobs.output_file import (
    LINE_START,
    BatchItem,
    BatchLine,
    ItemError,
    OutputFile,
    Survey,
)
from turbofit.core.errors import UsageError

DIGESTS = [11, 22, 33]


def line(number: int, digest: int | None = None, error: object = None) -> bytes:
    digest = DIGESTS[number - 1] if digest is None else digest
    return json.dumps({"id": f"batch_req_{number}-{digest:08x}", "error": error}).encode() + b"\n"


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """An output, beside which nothing is left."""
    yield tmp_path / "out.jsonl"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def resumed(path: Path):
    """The size, answers and failures, and the items that have their line."""
    survey = Survey(items_of(DIGESTS))
    with closing(OutputFile(path)) as output:
        output.resume(survey)
        counts = output.answered, output.failed
    return path.stat().st_size, counts, [number for number in (1, 2, 3) if survey.done[number]]


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("kept", "torn"),
    [
        *((line(2), torn) for torn in (
            b"", b'{"id": "batch_req_1-00', line(1)[:-1], b"\0" * 500, b"\0" * 50 + b"\n" + line(3),
        )),
        *((b"", torn) for torn in (
            b"", b"\0" * 500, b'{"id":"bat', b'{"id":"bat' + b"\0" * 500, b'{"id":"batch_req_1-00',
            b'{"id":"batch_req_1' + b"\0" * 50 + b"\n" + line(3),
        )),
    ],
)  # fmt: skip
def test_what_is_no_whole_line_is_cut_off(kept, torn, path) -> None:
    path.write_bytes(kept + torn)
    assert resumed(path) == (len(kept), (int(bool(kept)), 0), [2] * bool(kept))
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((data, "line 1 of .* is no line of a batch") for data in (
            b'{"precious": [1, 2]}', b"no end of line", b"{ ", b"\0text", b"\0\n",
            b"\0" * 500 + b"\nx", b"\x89PNG\r\n\x1a\n\0\0",
            '{"id":"batch_req_1'.encode("utf-16-le"),
        )),
        (line(3) + line(1, 12), "line 2 of .* is of another input"),
        (line(3) + line(2) * 2, "line 3 of .* is the second line of one item"),
        (line(3) + b'{"a": 1}\n', "line 2 of .* is no line of a batch"),
        (line(3) + b"hello\n" + line(2), "line 2 of .* is no line of a batch"),
        (b'{"id": "batch_req_900000000000-00000001"}\n', "is of another input"),
    ],
)  # fmt: skip
def test_another_file_stays_as_it_is(data, message, path) -> None:
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        resumed(path)
    assert path.read_bytes() == data


def test_the_lock_ends_with_the_process(path) -> None:
    code = (
        "import sys, pathlib; from turbofit.batch_jobs.output_file import OutputFile\n"
        "f = OutputFile(pathlib.Path(sys.argv[1])); print('locked', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(UsageError, match="another turbofit batch writes"):
            OutputFile(path)
        child.kill()
        child.wait()
    resumed(path)


def test_a_full_disk_leaves_whole_lines(path, monkeypatch) -> None:
    with closing(OutputFile(path)) as output:
        output.resume(Survey(items_of(DIGESTS)))
        output.append(line(1), failed=False)
        real, calls = os.write, []

        def write(fd: int, data: bytes) -> int:
            calls.append(fd)
            return real(fd, bytes(data)[:10]) if len(calls) == 1 else full()

        monkeypatch.setattr(output_file.os, "write", write)
        with pytest.raises(UsageError, match="No space left on device") as caught:
            output.append(line(2), failed=False)
        assert "make room" in caught.value.hint
        monkeypatch.undo()
    assert path.read_bytes() == line(1)
    assert resumed(path)[2] == [1]


@pytest.mark.parametrize("foreign", [b"a line of another program\n", b"{", line(3)])
@pytest.mark.parametrize("then", ["append", "sync"])
def test_what_another_program_appends_is_seen(foreign: bytes, then: str, path: Path) -> None:
    """A line behind its bytes would be lost, and the next run would end at them."""
    with closing(OutputFile(path)) as output:
        output.resume(Survey(items_of(DIGESTS)))
        output.append(line(1), failed=False)
        output.sync()
        with path.open("ab") as other:
            other.write(foreign)
        with pytest.raises(UsageError, match="another program has written to") as caught:
            output.append(line(2), failed=False) if then == "append" else output.sync()
    assert path.read_bytes() == line(1) + foreign
    assert "remove" in caught.value.hint
    if foreign.startswith(b"a"):
        with pytest.raises(UsageError, match="is no line of a batch") as caught:
            resumed(path)
        assert "remove this line" in caught.value.hint


def test_its_own_lines_are_no_other_program_s(path: Path, monkeypatch) -> None:
    """The file is synced in a thread, while lines are appended."""
    real = os.fstat
    with closing(OutputFile(path)) as output:
        output.resume(Survey(items_of(DIGESTS)))

        def fstat(fd: int) -> os.stat_result:
            monkeypatch.setattr(output_file.os, "fstat", real)
            output.append(line(1), failed=False)
            return real(fd)

        monkeypatch.setattr(output_file.os, "fstat", fstat)
        output.sync()
    assert path.read_bytes() == line(1)


def test_what_can_be_no_output_is_said(tmp_path) -> None:
    outputs = {".": "Is a directory", "none/out": "No such file", os.devnull: "no file"}
    for name, words in outputs.items():
        with pytest.raises(UsageError, match=words):
            OutputFile(tmp_path / name)


def test_an_input_that_changes_meanwhile_is_noticed() -> None:
    for later, words in (
        ([BatchItem(number=2, digest=3)], "at item 1"),
        ([*items_of([11]), BatchItem(number=3, digest=1)], "at item 2"),
        (items_of([11, 22]), "at item 3"),
    ):
        with pytest.raises(UsageError, match=f"while it was read, {words}"):
            list(Survey(items_of(DIGESTS)).pending(iter(later)))


def test_a_line_is_one_line_and_its_id_names_the_place_in_the_input() -> None:
    item = BatchItem(number=12, digest=7)
    error = {"code": "c", "message": "a\nb"}
    raw = msgspec.json.encode(BatchLine(id=item.line_id, custom_id=None, error=error))
    assert b"\n" not in raw
    assert raw.startswith(LINE_START)
    assert list(json.loads(raw)) == ["id", "custom_id", "response", "error"]
    assert ItemError("c", "\udcff.png is not there").message == "\\udcff.png is not there"
    assert item.line_id == "batch_req_12-00000007"
