from __future__ import annotations

import json

import msgspec
import pytest

from turbofit.batch.item import (
    LINE_START,
    BatchError,
    BatchItem,
    BatchLine,
    BatchResponse,
    ItemError,
    digest_of,
    place_of,
)


def test_an_id_names_the_place_in_the_input() -> None:
    item = BatchItem(number=12, digest=digest_of(b"x"))
    assert place_of(item.line_id) == (12, item.digest)
    for text in ("", "batch_req_1", "batch_req_1-x", "batch_req_-00000000", "chatcmpl-7"):
        assert place_of(text) is None


def test_a_digest_is_never_0() -> None:
    assert digest_of(b"") == 1
    assert digest_of(b"a") != digest_of(b"b")


def test_a_line_is_one_line() -> None:
    error = BatchError(code="c", message="two\nlines")
    identity = BatchItem(number=1, digest=1).line_id
    raw = msgspec.json.encode(BatchLine(id=identity, custom_id=None, error=error))
    assert b"\n" not in raw
    assert raw.startswith(LINE_START)
    assert list(json.loads(raw)) == ["id", "custom_id", "response", "error"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"choices": [{"message": {"content": "a"}}]}, "a"),
        ({"choices": [{"text": "b"}]}, "b"),
        ({"choices": [{"message": {"content": None}}]}, None),
        ({"choices": []}, None),
        ("<html>", None),
    ],
)
def test_the_text_of_an_answer(body, text) -> None:
    response = BatchResponse(status_code=200, request_id="", body=body)
    assert BatchLine(id="i", custom_id="c", response=response).text == text
    assert BatchLine(id="i", custom_id="c").text is None


def test_a_file_name_of_any_bytes_can_be_told() -> None:
    assert ItemError("c", "\udcff.png is not there").message == "\\udcff.png is not there"
