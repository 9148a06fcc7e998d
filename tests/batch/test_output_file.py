"""The output and its lines; what is known of an input before anything is sent."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.batch.standin import items_of
from turbofit.batch import output_file
from turbofit.batch.output_file import (
    LINE_START,
    BatchError,
    BatchItem,
    BatchLine,
    BatchResponse,
    ItemError,
    OutputFile,
    Survey,
    digest_of,
    place_of,
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


def resumed(path: Path, *, retry_failed: bool = False):
    """The size, answers and failures, and the items that have their line."""
    survey = Survey(items_of(DIGESTS))
    with OutputFile(path) as output:
        output.resume(survey, retry_failed=retry_failed)
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
        *((data, "line 1 of .* is none of a batch") for data in (
            b'{"precious": [1, 2]}', b"no end of line", b"{ ", b"\0text", b"\0\n",
            b"\0" * 500 + b"\nx", b"\x89PNG\r\n\x1a\n\0\0",
            '{"id":"batch_req_1'.encode("utf-16-le"),
        )),
        (line(3) + line(1, 12), "line 2 of .* is of another input"),
        (line(3) + line(2) * 2, "line 3 of .* is the second of its item"),
        (line(3) + b'{"a": 1}\n', "line 2 of .* is none of a batch"),
        (line(3) + b"hello\n" + line(2), "line 2 of .* is none of a batch"),
        (b'{"id": "batch_req_900000000000-00000001"}\n', "is of another input"),
    ],
)  # fmt: skip
def test_another_file_stays_as_it_is(data, message, path) -> None:
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message):
        resumed(path)
    assert path.read_bytes() == data


def test_failed_items_can_be_taken_out_and_the_lock_is_the_new_file_s(path) -> None:
    path.write_bytes(line(3) + line(1, error={}) + line(2) + b"torn")
    path.chmod(0o640)
    with OutputFile(path) as output:
        output.resume(Survey(items_of(DIGESTS)), retry_failed=True)
        with pytest.raises(UsageError, match="another turbofit batch writes"):
            OutputFile(path)
        output.append(line(1), failed=False)
    assert path.read_bytes() == line(3) + line(2) + line(1)
    assert path.stat().st_mode & 0o777 == 0o640
    assert resumed(path)[1:] == ((3, 0), [1, 2, 3])


def test_failed_items_are_taken_out_behind_a_link_to_another_disk(tmp_path, monkeypatch) -> None:
    path, disk = tmp_path / "out.jsonl", tmp_path / "disk"
    disk.mkdir()
    (disk / "real.jsonl").write_bytes(line(1, error={}) + line(2))
    path.symlink_to(disk / "real.jsonl")
    real = os.replace

    def replace(source: str, target: os.PathLike[str]) -> None:
        if os.path.dirname(source) != os.path.dirname(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(output_file.os, "replace", replace)
    assert resumed(path, retry_failed=True) == (len(line(2)), (1, 0), [2])
    assert path.is_symlink()
    assert (disk / "real.jsonl").read_bytes() == line(2)
    assert sorted(os.listdir(tmp_path)) == ["disk", "out.jsonl"]
    assert os.listdir(disk) == ["real.jsonl"]


def test_an_exchange_that_fails_leaves_no_copy(path, monkeypatch) -> None:
    path.write_bytes(line(1, error={}) + b"hello\n")
    with pytest.raises(UsageError, match="is none of a batch"):
        resumed(path, retry_failed=True)
    assert os.listdir(path.parent) == [path.name]
    path.write_bytes(line(1, error={}) + line(2))
    monkeypatch.setattr(output_file.os, "replace", full)
    with pytest.raises(UsageError, match="No space left on device"):
        resumed(path, retry_failed=True)
    assert path.read_bytes() == line(1, error={}) + line(2)


def test_the_lock_ends_with_the_process(path) -> None:
    code = (
        "import sys, pathlib; from turbofit.batch.output_file import OutputFile\n"
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
    with OutputFile(path) as output:
        output.resume(Survey(items_of(DIGESTS)), retry_failed=False)
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


def test_what_can_be_no_output_is_said(tmp_path) -> None:
    outputs = {".": "Is a directory", "none/out": "No such file", os.devnull: "no file"}
    for name, words in outputs.items():
        with pytest.raises(UsageError, match=words):
            OutputFile(tmp_path / name)


def test_an_input_that_changes_meanwhile_is_noticed() -> None:
    for later, words in (
        ([BatchItem(number=2, digest=3)], "at item 2"),
        ([BatchItem(number=3, digest=1)], "at item 3"),
        (items_of([11, 22]), "it had 3 items and has 2"),
    ):
        with pytest.raises(UsageError, match=f"while it was read, {words}"):
            list(Survey(items_of(DIGESTS)).pending(iter(later)))


def test_a_line_is_one_line_and_its_id_names_the_place_in_the_input() -> None:
    assert digest_of(b"") == 1, "never 0"
    item = BatchItem(number=12, digest=digest_of(b"x"))
    error = BatchError(code="c", message="a\nb")
    raw = msgspec.json.encode(BatchLine(id=item.line_id, custom_id=None, error=error))
    assert b"\n" not in raw
    assert raw.startswith(LINE_START)
    assert list(json.loads(raw)) == ["id", "custom_id", "response", "error"]
    assert ItemError("c", "\udcff.png is not there").message == "\\udcff.png is not there"
    assert place_of(item.line_id) == (12, item.digest)
    for text in ("", "batch_req_1", "batch_req_1-x", "batch_req_-00000000", "chatcmpl-7"):
        assert place_of(text) is None


def test_the_text_of_an_answer() -> None:
    for body, text in (
        ({"choices": [{"message": {"content": "a"}}]}, "a"),
        ({"choices": [{"text": "b"}]}, "b"),
        ({"choices": [{"message": {"content": None}}]}, None),
        ({"choices": []}, None),
        ("<html>", None),
    ):
        response = BatchResponse(status_code=200, request_id="", body=body)
        assert BatchLine(id="i", custom_id="c", response=response).text == text
    assert BatchLine(id="i", custom_id="c").text is None
