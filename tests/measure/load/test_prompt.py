"""The requests of a load: their words, images and what they share."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO

from PIL import Image

from turbofit.measure.load.prompt import PromptWriter
from turbofit.measure.load.spec import LoadSpec


def test_bodies_have_their_sizes_and_share_only_what_they_should() -> None:
    spec = LoadSpec.of(
        prompt_tokens=50, output_tokens=7, images=2, image_size=(64, 32), shared_prefix=20
    )
    writer = PromptWriter("m", spec)
    first, second = writer.body(), writer.body()
    assert (first["max_tokens"], first["ignore_eos"]) == (7, True)
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
    body = PromptWriter("m", LoadSpec.of(images=0, stop_early=True)).body()
    assert "ignore_eos" not in body
    assert len(body["messages"][0]["content"].split()) == 256


def test_a_request_may_state_no_length_and_ask_for_one_piece() -> None:
    body = PromptWriter("m", LoadSpec.of(images=0, output_tokens=0, whole=True)).body()
    assert not {"max_tokens", "ignore_eos", "stream", "stream_options"} & body.keys()
    stated = PromptWriter("m", LoadSpec.of(images=0, output_tokens=7)).body()
    assert (stated["max_tokens"], stated["ignore_eos"], stated["stream"]) == (7, True, True)
