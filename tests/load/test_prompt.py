from __future__ import annotations

from base64 import b64decode
from io import BytesIO

from PIL import Image

from turbofit.load.driver import RequestShape
from turbofit.load.prompt import PromptWriter, TokenCount, counted_from, png, probes


def test_an_image_is_what_its_header_says_and_small() -> None:
    data = png(1000, 700, 0x123456)
    image = Image.open(BytesIO(data)).convert("RGB")
    assert image.size == (1000, 700)
    assert image.getpixel((999, 699)) == (0x12, 0x34, 0x56)
    assert len(data) < 2000


def test_tokens_of_a_word_follow_from_two_counts() -> None:
    short, long = (len(text.split()) for text in probes())
    count = counted_from(20 + 2 * short, 20 + 2 * long)
    assert count == TokenCount(2.0, 20.0, counted=True)
    assert count.words_for(220) == 100
    assert count.words_for(3) == 1


def test_a_server_that_counts_nothing_is_taken_to_have_a_token_a_word() -> None:
    for counts in ((None, None), (5, None), (7, 7)):
        assert counted_from(*counts) == TokenCount()
    assert TokenCount().words_for(64) == 64


def test_bodies_have_their_sizes_and_share_only_what_they_should() -> None:
    writer = PromptWriter("m", TokenCount(), 0, stop_early=False)
    shape = RequestShape(50, 7, ((64, 32), (16, 16)), shared=20)
    first, second = writer.body(shape), writer.body(shape)
    assert first["max_tokens"] == 7
    assert first["ignore_eos"] is True
    assert first["stream_options"] == {"include_usage": True}
    one, other = first["messages"][0]["content"], second["messages"][0]["content"]
    assert [part["type"] for part in one] == ["image_url", "image_url", "text"]
    assert one[0] != other[0]
    words, others = one[2]["text"].split(), other[2]["text"].split()
    assert len(words) == len(others) == 50
    assert words[:20] == others[:20]
    assert words != others
    data = b64decode(one[0]["image_url"]["url"].partition(",")[2])
    assert Image.open(BytesIO(data)).size == (64, 32)


def test_an_answer_may_end_early_where_that_is_asked_for() -> None:
    body = PromptWriter("m", TokenCount(), 0, stop_early=True).body(RequestShape(5, 7, ()))
    assert "ignore_eos" not in body
    assert isinstance(body["messages"][0]["content"], str)
