"""Inputs: lines of JSONL, images of a folder, rows of CSV and Parquet files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.batch.standin import request
from turbofit.batch import batch_input
from turbofit.batch.batch_input import open_input
from turbofit.batch.batch_spec import BatchSpec
from turbofit.batch.output_file import ItemError
from turbofit.batch.sender import request_body
from turbofit.core.errors import PackageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


def test_the_kind_is_seen(tmp_path) -> None:
    for name, text in (("a.jsonl", ""), ("a.txt", ""), ("a.CSV", "prompt\n"), ("a.png", "")):
        (tmp_path / name).write_text(text)
    for name in ("a.jsonl", "a.txt"):
        assert open_input(tmp_path / name, BatchSpec()).max_tokens is None
    for name, prompt in (("a.CSV", None), (".", "x")):
        source = open_input(tmp_path / name, BatchSpec(prompt=prompt))
        assert (source.base, source.max_tokens) == (str(tmp_path), 512)


def test_what_cannot_be_an_input_is_said(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("a.jsonl", "a.png"):
        (tmp_path / file).write_text("")
    for name, given, words in (
        ("none", {}, "cannot be read: No such file"),
        ("a" * 300, {}, "cannot be read: File name too long"),
        (os.devnull, {}, "no file that can be read twice"),
        ("a.jsonl", {"prompt": "x"}, "--prompt does not fit"),
        (".", {"prompt": "x", "image_column": ("y",)}, "no column 'y'"),
        (".", {}, "no --prompt says what to ask"),
        ("empty", {"prompt": "x"}, "holds no image"),
    ):
        with pytest.raises(UsageError, match=words):
            open_input(tmp_path / name, BatchSpec(**given))


def test_images_by_name_and_folder_by_folder(tmp_path) -> None:
    for name in ("b.PNG", "a/2.jpeg", "a/1.webp", "c.txt", ".hidden.png", ".d/x.png", "z.gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    source = open_input(tmp_path, BatchSpec(prompt="{stem}: what is {path}, {name}?"))
    found = list(source.items())
    names = ["a/1.webp", "a/2.jpeg", "b.PNG", "z.gif"]
    assert [(one.number, one.custom_id) for one in found] == list(enumerate(names, 1))
    image, text = content(found[0])
    assert image["image_url"]["url"] == "./a/1.webp"
    assert text["text"] == "1: what is a/1.webp, 1.webp?"


def test_a_name_that_is_no_utf8_has_one_that_is(tmp_path) -> None:
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (item,) = open_input(tmp_path, BatchSpec(prompt="{name}")).items()
    assert item.custom_id == "\\xff.png"
    assert os.path.exists(tmp_path / content(item)[0]["image_url"]["url"])
    (other,) = open_input(tmp_path, BatchSpec(prompt="another prompt")).items()
    assert other.digest != item.digest


def items(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(open_input(path, BatchSpec()).items())


def test_lines_are_items_by_their_numbers(tmp_path) -> None:
    text = "\ufeff" + json.dumps(request("a", "x")) + "\r\n\n  \n" + json.dumps(request("b", "y"))
    first, second = items(tmp_path / "in.jsonl", text)
    assert (first.number, first.custom_id, first.fault) == (1, "a", None)
    assert (second.number, second.custom_id, second.fault) == (4, "b", None)
    assert json.loads(bytes(second.body)) == request("b", "y")["body"]
    assert first.url == "/v1/chat/completions"
    assert first.digest != items(tmp_path / "in.jsonl", json.dumps(request("a", "y")))[0].digest


def test_a_broken_line_is_its_items_failure(tmp_path) -> None:
    good = json.dumps(request("good", "x"))
    for line, name, code in (
        ("{", None, "bad_line"),
        ("[]", None, "bad_line"),
        ("\xff", None, "bad_line"),
        ('{"custom_id": 7, "body": {}}', None, "bad_line"),
        ('{"custom_id": "a", "body": []}', "a", "bad_line"),
        ('{"custom_id": "a", "body": {}, "method": "GET"}', "a", "bad_method"),
        ('{"custom_id": "a", "body": {}, "url": "http://elsewhere/v1"}', "a", "bad_url"),
        ("[" * 100000, None, "bad_line"),
    ):
        text = f"{good}\n{line}\n{good}".encode("latin-1")
        first, broken, last = items(tmp_path / "in.jsonl", text)
        assert first.fault is last.fault is None
        assert (broken.custom_id, broken.fault.code) == (name, code)
        assert "\n" not in broken.fault.message


def table(tmp_path: Path, text: str | bytes, **given):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_input(path, BatchSpec(**given))


def content(item):
    return item.body["messages"][0]["content"]


def test_rows_are_items(tmp_path) -> None:
    text = '\ufeffcustom_id,image,prompt,n\na,x.png,"What, now?",1\n,,text only,2\n'
    first, second = table(tmp_path, text).items()
    assert (first.custom_id, second.custom_id) == ("a", "row-2")
    assert [part(one) for one in content(first)] == ["x.png", "What, now?"]
    assert content(second) == "text only"
    # A prompt takes columns, and images have theirs.
    given = {"prompt": "{q}?", "image_column": ("b", "a"), "max_tokens": 7}
    source = table(tmp_path, "q,a,b\nwhy,1.png,2.png\n", **given)
    (item,) = source.items()
    assert [part(one) for one in content(item)] == ["2.png", "1.png", "why?"]
    assert source.max_tokens == 7


def part(one: dict[str, Any]) -> str:
    """The text, or the address of the image."""
    return one.get("text") or one["image_url"]["url"]


def test_broken_rows_are_their_failures(tmp_path) -> None:
    text = b"prompt,x\none,1\ntwo\nthree,\xff\nfour,4,5\n\nfive,5\n"
    found = list(table(tmp_path, text, prompt="{prompt} {x}").items())
    assert [(one.number, one.fault is None) for one in found] == [
        (1, True), (2, False), (3, True), (4, False), (5, True),
    ]  # fmt: skip
    assert "line 3 has not one cell for each column" in found[1].fault.message
    with pytest.raises(ItemError, match="cannot be sent"):
        request_body(found[2], "m", replace=True, base="", max_tokens=None)


def test_what_csv_cannot_read_is_one_rows_failure(tmp_path, monkeypatch) -> None:
    text = "prompt\na\n" + "x" * 200000 + "\nb\n"
    assert all(one.fault is None for one in table(tmp_path, text).items()), "a long cell is one"
    monkeypatch.setattr(batch_input, "_LARGEST_CELL", 1000)
    found = list(table(tmp_path, text).items())
    assert [one.fault is None for one in found] == [True, False, True]
    assert "is no CSV" in found[1].fault.message


def test_placeholders_are_filled_and_other_braces_stay(tmp_path) -> None:
    prompt = 'What is {a b}? Answer {"a": {"b": 1}} or {} or {{name}}.'
    (item,) = table(tmp_path, "a b,c\n{x},1\n", prompt=prompt).items()
    assert content(item) == 'What is {x}? Answer {"a": {"b": 1}} or {} or {name}.'
    with pytest.raises(UsageError, match=r"\{nam\} in the prompt is no placeholder") as caught:
        table(tmp_path, "name,a column\n", prompt="{nam}")
    assert caught.value.hint == "there are {name}, {a column}; write {{nam}} for {nam} itself"


def test_wrong_columns_are_said(tmp_path) -> None:
    for text, given, message in (
        ("", {}, "does not begin with the names"),
        ("a,a\n1,2\n", {}, "does not begin with the names"),
        ("a\n1\n", {}, "no column 'prompt', and no --prompt"),
        ("a\n1\n", {"prompt": "{b}"}, "no placeholder"),
        ("a\n1\n", {"prompt": "x", "image_column": ("b",)}, "no column 'b'"),
    ):
        with pytest.raises(UsageError, match=message):
            table(tmp_path, text, **given)


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (parquet_file := tmp_path / "x.parquet").touch()
    with pytest.raises(PackageError, match="pyarrow is not installed"):
        open_input(parquet_file, BatchSpec())


class Batch(list):
    """pyarrow's calls that are used, as pyarrow 26 answers them."""

    num_rows = property(len)

    def slice(self, at: int, length: int) -> Batch:
        return Batch(self[at : at + length])

    def to_pylist(self) -> list[dict[str, Any]]:
        if any(row["prompt"] == "far" for row in self):
            raise OverflowError("date value out of range")
        return self


def test_rows_of_a_parquet_file_with_images_in_them(tmp_path, monkeypatch) -> None:
    rows = [
        {"image": {"bytes": b"PNG", "path": "no"}, "prompt": "a"},
        {"image": {"bytes": None, "path": "p.png"}, "prompt": "b"},
        {"image": b"JPG", "prompt": "c"},
        {"image": None, "prompt": "far"},
        {"image": None, "prompt": None},
    ]

    def iter_batches(batch_size: int, columns: list[str]) -> tuple[Batch, Batch]:
        assert columns == ["image", "prompt"]
        return Batch(rows[:2]), Batch(rows[2:])

    schema = SimpleNamespace(names=["image", "prompt"])
    file = SimpleNamespace(schema_arrow=schema, iter_batches=iter_batches)
    arrow = SimpleNamespace(ArrowException=ValueError)
    parquet = SimpleNamespace(ParquetFile=lambda path: file)
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    (parquet_file := tmp_path / "x.parquet").touch()
    found = list(open_input(parquet_file, BatchSpec()).items())
    urls = [content(one)[0]["image_url"]["url"] for one in found[:3]]
    assert urls == ["data:image/unknown;base64,UE5H", "p.png", "data:image/unknown;base64,SlBH"]
    assert found[3].fault.message == "the row cannot be read: date value out of range"
    assert (content(found[4]), found[4].fault) == ("", None)


def parquet(tmp_path: Path, columns: Callable[[Any], dict[str, Any]], prompt: str | None = None):
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "t.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns(arrow)), path)
    return list(open_input(path, BatchSpec(prompt=prompt)).items())


def test_a_column_that_the_prompt_leaves_out_is_not_read(tmp_path) -> None:
    def far(arrow: Any) -> dict[str, Any]:
        return {"prompt": ["a", "b"], "t": arrow.array([0, 1 << 62], arrow.timestamp("us"))}

    assert [content(one) for one in parquet(tmp_path, far)] == ["a", "b"]
    found = parquet(tmp_path, far, prompt="No placeholder.")
    assert [content(one) for one in found] == ["No placeholder."] * 2


def test_a_row_of_a_parquet_file_that_cannot_be_read_fails_alone(tmp_path) -> None:
    def text(arrow: Any) -> Any:
        offsets = b"".join(at.to_bytes(4, "little") for at in (0, 1, 2, 3))
        buffers = [None, arrow.py_buffer(offsets), arrow.py_buffer(b"a\xffc")]
        return arrow.Array.from_buffers(arrow.string(), 3, buffers)

    def date(arrow: Any) -> Any:
        return arrow.array([0, 1 << 62, 0], arrow.timestamp("us"))

    for column in (text, date):
        found = parquet(tmp_path, lambda arrow, column=column: {"prompt": column(arrow)})
        assert [one.fault and one.fault.code for one in found] == [None, "bad_line", None]
        assert "the row cannot be read" in found[1].fault.message
        assert found[1].custom_id == "row-2"
