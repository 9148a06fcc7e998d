"""Qwen2.5-Omni behind the fallback's server: text and images in, text out."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.launch.fallback.support import OMNI_MAP, Served, picture, tiny_omni
from tests.launch.fallback.test_server import ask, chat

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("transformers", "accelerate", "fastapi")),
        reason="needs Transformers' server",
    ),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tiny_omni(tmp_path_factory.mktemp("omni")), placed=OMNI_MAP)
    yield server
    server.stop()


def test_text_and_images_are_answered(served):
    status, text = ask(served, chat())
    assert status == 200, text
    assert 1 <= text["usage"]["completion_tokens"] <= 4
    status, seen = ask(served, chat(picture(), picture(112, 56)))
    assert status == 200, seen
    # 4 and 8 tokens, and the two around each image.
    assert seen["usage"]["prompt_tokens"] == text["usage"]["prompt_tokens"] + 4 + 8 + 4


def test_streams_end(served):
    status, events = ask(served, chat(picture(), stream=True))
    assert status == 200, events
    assert events.rstrip().endswith("data: [DONE]")
