"""Inputs: lines of JSONL, images of a folder."""

from __future__ import annotations

import json
import os

import pytest

from tests.batch_jobs.standin import request
from turbofit.batch_jobs.batch_input import EXAMPLE_LINE, BatchSpec, open_input
from turbofit.core.errors import UsageError


def test_the_kind_is_seen(tmp_path) -> None:
    for name in ("a.jsonl", "a.txt", "a.png"):
        (tmp_path / name).write_text("")
    for name in ("a.jsonl", "a.txt"):
        assert open_input(tmp_path / name, BatchSpec()).max_tokens is None
    source = open_input(tmp_path, BatchSpec(prompt="x"))
    assert (source.base, source.max_tokens) == (str(tmp_path), 512)


def test_what_cannot_be_an_input_is_said(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("a.jsonl", "a.png"):
        (tmp_path / file).write_text("")
    for name, given, words in (
        ("none", {}, "cannot be read: No such file"),
        ("a" * 300, {}, "cannot be read: File name too long"),
        (os.devnull, {}, "is no regular file"),
        ("a.jsonl", {"prompt": "x"}, "--prompt does not fit"),
        (".", {"prompt": "{nam}"}, r"\{nam\} in the prompt is no placeholder"),
        (".", {}, "images of a folder need a --prompt"),
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
    assert second.body == request("b", "y")["body"]
    assert first.url == "/v1/chat/completions"
    assert first.digest != items(tmp_path / "in.jsonl", json.dumps(request("a", "y")))[0].digest


def test_a_broken_line_is_its_items_failure(tmp_path) -> None:
    good = json.dumps(request("good", "x"))
    for line, name, code in (
        ("{", None, "bad_line"),
        ("[]", None, "bad_line"),
        ("\xff", None, "bad_line"),
        ('{"custom_id": 7, "body": {}}', None, "bad_line"),
        ('{"custom_id": "a", "body": []}', None, "bad_line"),
        ('{"custom_id": "a", "body": {}, "method": "GET"}', None, "bad_line"),
        ('{"custom_id": "a", "body": {}, "url": "http://elsewhere/v1"}', None, "bad_line"),
        ("[" * 100000, None, "bad_line"),
    ):
        text = f"{good}\n{line}\n{good}".encode("latin-1")
        first, broken, last = items(tmp_path / "in.jsonl", text)
        assert first.fault is last.fault is None
        assert (broken.custom_id, broken.fault.code) == (name, code)
        assert "\n" not in broken.fault.message


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("photo.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "is an image"),
        ("table.xlsx", b"PK\3\4\0\0", "line 1, 'PK"),
        ("data.csv", b"image,question\n1.jpg,what?\n", "line 1, 'image,question', is no request"),
        ("in.jsonl", b'\n[{"custom_id": "a", "body": {}}]', "line 2, '[{"),
        ("in.jsonl", b'{"image": "1.jpg"}\n{"image": "2.jpg"}', "`custom_id`"),
    ],
)
@pytest.mark.parametrize("prompt", [None, "Describe it"])
def test_a_file_without_a_request_is_refused(tmp_path, name, data, said, prompt) -> None:
    """Before a server starts, and whatever else does not fit it."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        open_input(tmp_path / name, BatchSpec(prompt=prompt))
    assert said in caught.value.message


def test_a_file_whose_first_line_alone_is_no_request_is_taken(tmp_path) -> None:
    header, item = items(tmp_path / "in.jsonl", f"image,question\n{EXAMPLE_LINE}")
    assert header.fault is not None
    assert item.fault is None


def test_the_line_that_a_refusal_shows_is_a_request(tmp_path) -> None:
    (item,) = items(tmp_path / "in.jsonl", EXAMPLE_LINE)
    assert item.fault is None


def content(item):
    return item.body["messages"][0]["content"]


def test_placeholders_are_filled_and_other_braces_stay(tmp_path) -> None:
    (tmp_path / "{x}.png").touch()
    prompt = 'What is {stem}? Answer {"a": {"b": 1}} or {} or {{name}}.'
    (item,) = open_input(tmp_path, BatchSpec(prompt=prompt)).items()
    assert content(item)[1]["text"] == 'What is {x}? Answer {"a": {"b": 1}} or {} or {name}.'
    with pytest.raises(UsageError) as caught:
        open_input(tmp_path, BatchSpec(prompt="{nam}"))
    said = "placeholders are {name}, {stem} and {path}; {{nam}} means the text {nam}"
    assert caught.value.hint == said
