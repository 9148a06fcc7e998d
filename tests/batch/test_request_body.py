from __future__ import annotations

import json

import msgspec
import pytest

from turbofit.batch.folder_source import chat_body
from turbofit.batch.images import ImageLimits
from turbofit.batch.item import BatchItem, ItemError
from turbofit.batch.request_body import BodyWriter
from turbofit.launch.engine.image import flat_png


def writer(*, replace: bool = False, base: object = "", max_tokens: int | None = None):
    return BodyWriter(
        "served", replace=replace, base=str(base), limits=ImageLimits(), max_tokens=max_tokens
    )


def item(body) -> BatchItem:
    raw = body if isinstance(body, dict) else msgspec.Raw(body)
    return BatchItem(number=1, digest=1, body=raw)


def test_what_needs_no_change_is_sent_as_it_stands() -> None:
    raw = b'{ "model": "mine", "x": 1e2 }'
    assert writer().body(item(raw)) == raw


@pytest.mark.parametrize(
    ("raw", "options", "sent"),
    [
        (b'{"x": 1}', {}, {"x": 1, "model": "served"}),
        (b'{"model": "mine"}', {"replace": True}, {"model": "served"}),
        (b'{"model": "a"}', {"max_tokens": 7}, {"model": "a", "max_tokens": 7}),
        (b'{"model": "a", "max_tokens": 9}', {"max_tokens": 7}, {"model": "a", "max_tokens": 9}),
        (
            b'{"model": "a", "max_completion_tokens": 9}',
            {"max_tokens": 7},
            {"model": "a", "max_completion_tokens": 9},
        ),
    ],
)
def test_model_and_answer_length_are_filled_in(raw, options, sent) -> None:
    assert json.loads(writer(**options).body(item(raw))) == sent


def test_an_entry_stays_small_when_its_images_are_read(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(flat_png(64, 64))
    one = item(chat_body("?", ["a.png"]))
    sent = json.loads(writer(base=tmp_path).body(one))
    assert sent["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")
    assert one.body == chat_body("?", ["a.png"])


def test_images_of_a_jsonl_line_are_read_too(tmp_path) -> None:
    raw = msgspec.json.encode(chat_body("?", ["none.png"]))
    with pytest.raises(ItemError, match="is not there"):
        writer(base=tmp_path).body(item(raw))


def test_what_cannot_be_sent_is_the_items_failure() -> None:
    with pytest.raises(ItemError, match="no streams"):
        writer().body(item(b'{"stream": true}'))
    with pytest.raises(ItemError, match="cannot be sent"):
        writer().body(item(chat_body("\udcff", [])))
