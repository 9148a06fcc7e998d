from __future__ import annotations

import json

import pytest

from tests.batch.standin import request
from turbofit.batch import jsonl_source
from turbofit.batch.jsonl_source import JsonlSource


def items(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    source = JsonlSource(path, None)
    found = list(source.items())
    digests = {number: one for number, one in enumerate(source.digests(), 1) if one}
    assert digests == {one.number: one.digest for one in found}
    return found


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


def test_a_line_that_is_too_long_does_not_end_up_in_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(jsonl_source, "LONGEST_LINE", 400)
    good = json.dumps(request("good", "x"))
    found = items(tmp_path / "in.jsonl", good + "\n" + "x" * (3 << 20) + "\n" + good)
    assert [(one.number, one.fault is None) for one in found] == [(1, True), (2, False), (3, True)]
    assert "more than 400 bytes" in found[1].fault.message


def test_a_changed_line_has_another_digest(tmp_path) -> None:
    path = tmp_path / "in.jsonl"
    first = items(path, json.dumps(request("a", "x")))[0].digest
    assert items(path, json.dumps(request("a", "y")))[0].digest != first
