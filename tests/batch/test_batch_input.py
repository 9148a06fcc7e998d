from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.batch.standin import request
from turbofit.batch.batch_input import open_input
from turbofit.batch.batch_spec import BatchSpec
from turbofit.core.errors import UsageError


def test_the_kind_is_seen(tmp_path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text("")
        assert open_input(tmp_path / name, BatchSpec()).max_tokens is None
    (tmp_path / "a.CSV").write_text("prompt\n")
    assert open_input(tmp_path / "a.CSV", BatchSpec()).base == str(tmp_path)
    (tmp_path / "a.png").write_text("")
    assert open_input(tmp_path, BatchSpec(prompt="x")).base == str(tmp_path)


def test_a_prompt_may_be_a_file(tmp_path) -> None:
    (tmp_path / "a.png").write_text("")
    (tmp_path / "p.txt").write_text("two\nlines\n")
    source = open_input(tmp_path, BatchSpec(prompt_file=str(tmp_path / "p.txt")))
    (item,) = source.items()
    assert item.body["messages"][0]["content"][1]["text"] == "two\nlines"
    with pytest.raises(UsageError, match="cannot be read"):
        open_input(tmp_path, BatchSpec(prompt_file=str(tmp_path / "none")))


def test_what_cannot_be_an_input_is_said(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        open_input(tmp_path / "none", BatchSpec())
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        open_input(tmp_path / ("a" * 300), BatchSpec())
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UsageError, match="--prompt does not fit"):
        open_input(tmp_path / "a.jsonl", BatchSpec(prompt="x"))
    (tmp_path / "a.png").write_text("")
    with pytest.raises(UsageError, match="no column 'y'"):
        open_input(tmp_path, BatchSpec(prompt="x", image_column=("y",)))
    with pytest.raises(UsageError, match="no file that can be read twice"):
        open_input(Path(os.devnull), BatchSpec())


def test_images_by_name_and_folder_by_folder(tmp_path) -> None:
    for name in ("b.PNG", "a/2.jpeg", "a/1.webp", "c.txt", ".hidden.png", ".d/x.png", "z.gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    source = open_input(tmp_path, BatchSpec(prompt="{stem}: what is {path}, {name}?"))
    found = list(source.items())
    assert [one.custom_id for one in found] == ["a/1.webp", "a/2.jpeg", "b.PNG", "z.gif"]
    assert [one.number for one in found] == [1, 2, 3, 4]
    image, text = found[0].body["messages"][0]["content"]
    assert image["image_url"]["url"] == "./a/1.webp"
    assert text["text"] == "1: what is a/1.webp, 1.webp?"
    assert source.max_tokens == 512


def test_a_name_that_is_no_utf8_has_one_that_is(tmp_path) -> None:
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (item,) = open_input(tmp_path, BatchSpec(prompt="{name}")).items()
    assert item.custom_id == "\\xff.png"
    url = item.body["messages"][0]["content"][0]["image_url"]["url"]
    assert os.path.exists(tmp_path / url)


def test_no_prompt_and_no_image_are_said(tmp_path) -> None:
    with pytest.raises(UsageError, match="holds no image"):
        open_input(tmp_path, BatchSpec(prompt="x"))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UsageError, match="no --prompt says what to ask"):
        open_input(tmp_path, BatchSpec(prompt=None))


def test_another_prompt_is_another_input(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    first, second = (
        next(open_input(tmp_path, BatchSpec(prompt=prompt)).items()).digest for prompt in "xy"
    )
    assert first != second


def items(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(open_input(path, BatchSpec()).items())


def test_lines_are_items_by_their_numbers(tmp_path) -> None:
    text = "\ufeff" + json.dumps(request("a", "x")) + "\r\n\n  \n" + json.dumps(request("b", "y"))
    found = items(tmp_path / "in.jsonl", text)
    assert [(one.number, one.custom_id, one.fault) for one in found] == [
        (1, "a", None),
        (4, "b", None),
    ]
    assert json.loads(bytes(found[1].body)) == request("b", "y")["body"]
    assert found[0].url == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("line", "name", "code"),
    [
        ("{", None, "bad_line"),
        ("[]", None, "bad_line"),
        ("\xff", None, "bad_line"),
        ('{"custom_id": "a"}', "a", "bad_line"),
        ('{"custom_id": 7, "body": {}}', None, "bad_line"),
        ('{"custom_id": "a", "body": []}', "a", "bad_line"),
        ('{"custom_id": "a", "body": {}, "method": "GET"}', "a", "bad_method"),
        ('{"custom_id": "a", "body": {}, "url": "http://elsewhere/v1"}', "a", "bad_url"),
        ("[" * 100000, None, "bad_line"),
    ],
)
def test_a_broken_line_is_its_items_failure(line, name, code, tmp_path) -> None:
    good = json.dumps(request("good", "x"))
    found = items(tmp_path / "in.jsonl", f"{good}\n{line}\n".encode("latin-1") + good.encode())
    assert [one.fault is None for one in found] == [True, False, True]
    assert (found[1].custom_id, found[1].fault.code) == (name, code)
    assert "\n" not in found[1].fault.message


def test_a_changed_line_has_another_digest(tmp_path) -> None:
    path = tmp_path / "in.jsonl"
    first = items(path, json.dumps(request("a", "x")))[0].digest
    assert items(path, json.dumps(request("a", "y")))[0].digest != first
