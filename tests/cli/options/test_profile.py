"""Profiles: each value held to its field, each error with its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.cli.options.common_options import defaults, sections
from turbofit.cli.options.profile import Profile, read_profile, secret_of
from turbofit.core.errors import UsageError

GOOD = """\
model: internvl2-8b
machine:
  on: 4xrtx3090
workload:
  images: 2
  context: 8k
  queue_images: no
settings:
  max-prefill-token-num: 4096
  async: 0
  cudagraph_capture_batch_sizes: [1, 2]
serve:
gateway:
  port: 8000
  api_key: env:CHAT_KEY
  allowed_media_domains: example.com
"""


def profile(tmp_path: Path, text: str) -> Profile:
    file = tmp_path / "turbofit.yaml"
    file.write_text(text)
    return read_profile(file, sections())


def test_values_are_as_a_command_line_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAT_KEY", "secret")
    values = defaults(profile(tmp_path, GOOD))
    assert values.pop("api_key")() == ("secret",)
    assert values == {
        "model": "internvl2-8b", "on": "4xrtx3090", "images": 2, "context": 8192,
        "queue_images": False, "max_prefill_token_num": 4096, "async_": 0,
        "cudagraph_capture_batch_sizes": (1, 2), "port": 8000,
        "allowed_media_domains": ("example.com",),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("context: 8k", "contxt: 8k", "contxt is nothing that workload knows", "context?"),
        ("images: 2", "images: two", "workload.images 'two': it should be a whole", "images a"),
        ("images: 2", "images: true", "workload.images 'true'", "images a request"),
        ("images: 2", "images: {a: 1}", "workload.images should be a value", "images: VALUE"),
        ("env:CHAT_KEY", "s3cret", "gateway.api_key should refer to a key", "env:NAME"),
        ("  port: 8000", "  context: 8000", "context does not belong to gateway", "workload:"),
        ("gateway:", "gatway:", "gatway is nothing that a profile knows", "gateway?"),
        ("gateway:", "zzz:", "zzz is nothing that", "it knows model, models, machine"),
        ("queue_images: no", "images: 3", "line 5: no YAML: images stands twice", "turbofit init"),
        ("serve:", "serve: 7", "serve should be keys with values", "key: value"),
        ("model: internvl2-8b", "models: internvl2-8b", "models should be a list", "- model"),
        ("port: 8000", "port: 99999", "gateway.port '99999': it should be 65535", "where"),
        ("model: internvl2-8b", "model: [a]", "model ('a',): it should be a text", "a folder"),
        ("on: 4xrtx3090", "on: [", "no YAML", "turbofit init"),
    ],
)
def test_an_error_has_its_key_and_what_would_be_right(tmp_path, old, new, message, hint):
    with pytest.raises(UsageError) as caught:
        profile(tmp_path, GOOD.replace(old, new, 1))
    assert "turbofit.yaml: " in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["", "- a", "just words", "\x00", "a: &a [*a]", "? [1]\n: 2"])
def test_what_is_no_profile(tmp_path, text):
    with pytest.raises(UsageError):
        profile(tmp_path, text)


def test_several_models_have_sections_of_their_own(tmp_path):
    text = """\
models:
  - internvl2-1b
  - model: qwen2-vl-2b
    revision: main
    workload: {context: 4096}
workload:
  images: 3
  context: 8192
"""
    read = profile(tmp_path, text)
    first, second = (read.of_model(number) for number in range(2))
    assert first == {
        "model": "internvl2-1b", "images": 3, "context": 8192,
    }  # fmt: skip
    assert second == {
        "model": "qwen2-vl-2b", "revision": "main", "images": 3, "context": 4096,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["model:\n", "models:\n- a\n-\n", "models: [~]\n", "model: {model: ~}\n"]
)
def test_a_model_without_a_name(tmp_path, text):
    with pytest.raises(UsageError, match=r"turbofit.yaml: a model has no name") as caught:
        profile(tmp_path, text)
    assert caught.value.hint == "write model: NAME"


def test_keys_from_files_are_looked_for_beside_the_profile(tmp_path):
    (tmp_path / "key").write_text("abc\n")
    assert secret_of("file:key", tmp_path, "p:1") == "abc"
    (tmp_path / "key").write_text("abc\ndef\n")
    with pytest.raises(UsageError, match="p:1: file:key has several lines"):
        secret_of("file:key", tmp_path, "p:1")
    with pytest.raises(UsageError, match="cannot be read"):
        secret_of("file:none", tmp_path, "p:1")
    with pytest.raises(UsageError, match=r"p:1: .*~no-such-user/key cannot be read, or holds"):
        secret_of("file:~no-such-user/key", tmp_path, "p:1")
    with pytest.raises(UsageError, match="the environment has no TURBOFIT_TEST_NONE"):
        secret_of("env:TURBOFIT_TEST_NONE", tmp_path, "p:1")


def test_keys_of_the_environment_come_before_the_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBOFIT_API_KEYS", "other")
    assert "api_key" not in defaults(profile(tmp_path, GOOD))
