"""Hubs over HTTP: what they are asked, whom a token reaches, and how one that fails is told."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

from tests.model.test_source import refused
from tests.support.hubs import COMMIT, MODELSCOPE_API, Hub, ModelScope
from tests.support.safetensors_file import write_safetensors
from tests.support.tiny_checkpoints import llama_tensors, make
from turbofit.core.errors import UsageError
from turbofit.model import hub
from turbofit.model.source import resolve_model


def reached(monkeypatch, key, url):
    """Let the tests' own hub be asked, at its address."""
    for name in ("HF_HUB_OFFLINE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(key, url)


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    """ModelScope with one model, ``org/tiny``, and its store of large files elsewhere."""
    root = tmp_path / "site"
    make(root / "org" / "tiny")
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "True")
    with ModelScope(root) as site, ModelScope(root) as site.other:
        reached(monkeypatch, "MODELSCOPE_ENDPOINT", site.url)
        yield site


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A hub with one model, ``org/tiny``."""
    root = tmp_path / "hub"
    make(root / "org" / "tiny")
    with Hub(root) as server:
        reached(monkeypatch, "HF_ENDPOINT", server.url)
        yield server


def check_answer(where, seen):
    """The hub's own answer, of which weights were asked for by their first bytes alone."""
    model = resolve_model("org/tiny")
    assert (model.source.kind, model.source.sizes, model.source.checkpoint) == ("hub", "file", None)
    assert model.source.where.endswith(where)
    assert (model.weight_bytes, model.warnings) == (2 * model.parameters, ())
    ranges = [wanted for path, _, wanted in seen if ".safetensors" in path and ".json" not in path]
    assert ranges
    assert all(wanted and wanted.startswith("bytes=0-") for wanted in ranges)


def test_the_hub_answers(online):
    check_answer(f"org/tiny@{COMMIT}", online.seen)
    online.trick = "no_ranges"  # gives headers all the same
    assert resolve_model("org/tiny").source.sizes == "file"
    asked = len(online.seen)
    assert resolve_model("internvl2-8b").warnings == ()  # an alias never asks the network
    assert len(online.seen) == asked


def test_shards_and_long_headers_on_the_hub(online, monkeypatch):
    monkeypatch.setattr(hub, "_FIRST_BYTES", 100)  # a long header takes a second request
    folder = online.root / "org" / "tiny"
    (folder / "model.safetensors").unlink()
    tensors = llama_tensors()
    where = {name: f"model-{i % 12}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        write_safetensors(folder / file, {n: tensors[n] for n in tensors if where[n] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert resolve_model("org/tiny").weight_bytes == 2 * resolve_model("org/tiny").parameters
    (folder / "model-3.safetensors").unlink()
    assert "model-3" in refused("org/tiny").message


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(online, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Hub(online.root) as other, caplog.at_level(logging.DEBUG, logger="turbofit"):
        online.other, online.trick = other, "elsewhere"
        assert resolve_model("org/tiny").source.sizes == "file"
    assert {token for _, token, _ in online.seen} == {"Bearer secret"}
    assert other.seen
    assert {token for _, token, _ in other.seen} == {None}
    # The log tells each file, and no secret.
    told = [one.getMessage() for one in caplog.records]
    assert any("/org/tiny/resolve/main/config.json: 200" in text for text in told)
    assert told[-1].startswith("model org/tiny: ")
    assert told[-1].endswith("sizes by file")
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("trick", "words"),
    [("gated", None), ("broken", None), ("loop", None), ("scheme", None), ("endless", None),
     ("lies", "safetensors")],
)  # fmt: skip
def test_a_hub_that_fails_is_one_line(online, trick, words):
    assert "org/nothing" in refused("org/nothing").message
    assert "v9" in refused("org/tiny", revision="v9").message
    online.trick = trick
    with pytest.raises(UsageError, match=words) as error:
        resolve_model("org/tiny")
    assert "\n" not in error.value.message
    assert "/etc/passwd" not in error.value.message


def test_a_dripping_hub_meets_the_deadline(online, monkeypatch):
    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=lambda: online.now))
    online.trick = "drip"
    with pytest.raises(UsageError, match="more than 30 s"):
        resolve_model("org/tiny")
    assert online.now > 30


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://x", "http://", "http://[bad"])
@pytest.mark.parametrize("key", ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"])
def test_a_wrong_endpoint_is_named(monkeypatch, key, endpoint):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", str(key == "MODELSCOPE_ENDPOINT"))
    monkeypatch.setenv(key, endpoint)
    with pytest.raises(UsageError, match=key):
        resolve_model("org/tiny")


def test_modelscope_answers_instead_of_the_hub(modelscope, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    check_answer(f"{modelscope.url.removeprefix('http://')}/org/tiny@master", modelscope.other.seen)
    listing = f"{MODELSCOPE_API}org/tiny/repo/files?Revision=master&Recursive=False"
    assert modelscope.seen[0][0] == listing


def test_the_token_goes_to_modelscope_and_not_where_it_redirects(modelscope, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "se cret\n")
    assert resolve_model("org/tiny").source.sizes == "file"
    assert {cookie for _, cookie, _ in modelscope.seen} == {"m_session_id=se%20cret"}
    assert {cookie for _, cookie, _ in modelscope.other.seen} == {None}


@pytest.mark.parametrize(
    ("trick", "message"),
    [("", ""), ("says", ""), ("private", "HTTP 403"), ("html", "not JSON")],
)
def test_unknown_to_modelscope_and_a_site_that_fails(modelscope, trick, message):
    modelscope.trick = trick
    error = refused("org/tiny" if message else "org/nothing")
    assert (message or "no model org/nothing at master") in error.message
    assert "MODELSCOPE" in error.hint
    if not message:
        assert "v9" in refused("org/tiny", revision="v9").message
        # A preset stands in under the id that was asked for.
        hub_id = "LLM-Research/Meta-Llama-3.1-8B-Instruct"
        model = resolve_model(hub_id)
        assert (model.source.kind, model.source.where) == ("preset", "llama-3.1-8b")
        assert model.hub_id == hub_id
        assert "no model" in model.warnings[0]
