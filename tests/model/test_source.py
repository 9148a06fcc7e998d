"""Folder, hub caches, hubs, preset: which one answers, and what is said where the others cannot."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.support.checkpoints import make_internvl2, make_text, write_safetensors
from tests.support.hubs import COMMIT, MODELSCOPE_API, Hub, ModelScope
from tests.support.tiny_checkpoints import llama_tensors, make
from turbofit.core.errors import UsageError
from turbofit.model import hub
from turbofit.model.folder import hub_cache, modelscope_folders, uses_modelscope
from turbofit.model.source import resolve_model


def reached(monkeypatch, key, url):
    """Let the tests' own hub be asked, at its address."""
    for name in ("HF_HUB_OFFLINE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(key, url)


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A hub with one model, ``org/tiny``."""
    root = tmp_path / "hub"
    make(root / "org" / "tiny")
    with Hub(root) as server:
        reached(monkeypatch, "HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    """ModelScope with one model, ``org/tiny``, and its store of large files elsewhere."""
    root = tmp_path / "site"
    make(root / "org" / "tiny")
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "True")
    with ModelScope(root) as site, ModelScope(root) as site.other:
        reached(monkeypatch, "MODELSCOPE_ENDPOINT", site.url)
        yield site


def refused(name: str, **keywords: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolve_model(name, **keywords)
    assert "cannot be reached" not in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


def cache_of(tmp_path, hub_id, commit=COMMIT, ref="main"):
    """The folder of a snapshot in the local hub cache."""
    base = tmp_path / "hf" / "hub" / f"models--{hub_id.replace('/', '--')}"
    folder = base / "snapshots" / commit
    folder.mkdir(parents=True)
    if ref:
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / ref).write_text(commit)
    return folder


def test_a_folder_wins_over_everything_where_it_has_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "internvl2-8b").mkdir()
    assert resolve_model("internvl2-8b").source.kind == "preset"
    assert "config.json" in refused("./internvl2-8b").message
    make(tmp_path / "internvl2-8b")
    model = resolve_model("internvl2-8b")
    assert (model.source.kind, model.architecture) == ("folder", "LlamaForCausalLM")


@pytest.mark.parametrize("config", ["", '{"architectures": ["LlavaLlamaForCausalLM"]}'])
def test_an_adapter_is_not_a_model(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text("{}")
    if config:
        (tmp_path / "config.json").write_text(config)
    assert "turbofit merge BASE ADAPTER OUT" in refused(str(tmp_path)).hint


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", ""), ("  ", ""), ("./gone", ""), ("/gone", ""), ("~/gone", ""), ("..", ""),
        ("a\0b", ""), ("./a\0b", ""), ("x" * 10_000, ""), ("internvl2-9b", "internvl2-8b"),
    ],
)  # fmt: skip
def test_names_of_nothing(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(name)
    assert hint in error.hint
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("path", "hub_id"),
    [
        ("/data/models/InternVL2_5-8B-MPO", "OpenGVLab/InternVL2_5-8B"),
        ("./Qwen2.5-VL-7B-Instruct-sft", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("/data/Qwen2.5-VL-7B-Instruct-lora-merged", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("/data/Qwen2.5-VL-7B-Instruct-merged", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_a_missing_folder_with_a_known_end_has_its_base_s_shapes(
    path, hub_id, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = resolve_model(path)
    assert model.weight_bytes == resolve_model(hub_id).weight_bytes
    assert model.hub_id == path  # the folder is where the command runs
    assert "its shapes are assumed to be those of the preset" in model.warnings[0]


@pytest.mark.parametrize("path", ["/data/Qwen2.5-VL-7B-Instruct-lora", "/data/Qwen2.5-VL-9B-sft"])
def test_a_missing_folder_of_another_kind_is_refused(path):
    assert refused(path)


def test_the_cache_answers_a_hub_id_and_an_alias(tmp_path):
    hub_id = "OpenGVLab/InternVL2-8B"
    folder = make_internvl2(cache_of(tmp_path, hub_id))
    for name in (hub_id, "internvl2-8b"):
        model = resolve_model(name)
        assert (model.source.kind, model.source.where) == ("hub_cache", str(folder))
        assert (model.source.checkpoint, model.source.sizes) == (str(folder), "file")
        assert (model.name, model.hub_id) == ("InternVL2-8B", hub_id)
    # A snapshot that is half downloaded is not the model, but its config is still the best known.
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve_model("internvl2-8b").source.kind == "preset"
    model = resolve_model(hub_id)
    source = (model.source.kind, model.source.sizes, model.source.checkpoint)
    assert source == ("hub_cache", "formula", None)
    assert "not in the local hub cache" in model.warnings[0]


def test_revisions_in_the_cache(tmp_path):
    make_text(cache_of(tmp_path, "org/tiny", commit="b" * 40, ref="v1"))
    assert resolve_model("org/tiny", revision="v1").source.kind == "hub_cache"
    assert resolve_model("org/tiny", revision="b" * 40).source.kind == "hub_cache"
    for revision in (None, "v2", "../../v1", "\0", "b" * 39):
        with pytest.raises(UsageError):
            resolve_model("org/tiny", revision=revision)


def check_answer(where, seen):
    """The hub's own answer, of which weights were asked for by their first bytes alone."""
    model = resolve_model("org/tiny")
    assert (model.source.kind, model.source.sizes, model.source.checkpoint) == ("hub", "file", None)
    assert model.source.where.endswith(where)
    assert model.weight_bytes == 2 * model.parameters
    assert model.warnings == ()
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


def test_a_preset_stands_in_for_a_hub_that_is_out_of_reach(monkeypatch):
    model_id = "OpenGVLab/InternVL2-8B"
    assert "forbids the network" in resolve_model(model_id).warnings[0]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "yes")
    assert "forbids the network" in resolve_model(model_id).warnings[0]
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    model = resolve_model(model_id)
    assert model.source.kind == "preset"
    assert "127.0.0.1:9 cannot be reached" in model.warnings[0]
    assert "preset internvl2-8b" in model.warnings[0]
    with pytest.raises(UsageError, match="cannot be reached"):
        resolve_model("org/tiny")


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://x", "http://", "http://[bad"])
@pytest.mark.parametrize("key", ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"])
def test_a_wrong_endpoint_is_named(monkeypatch, key, endpoint):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", str(key == "MODELSCOPE_ENDPOINT"))
    monkeypatch.setenv(key, endpoint)
    with pytest.raises(UsageError, match=key):
        resolve_model("org/tiny")


NAMES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "given",
    [
        {}, {"XDG_CACHE_HOME": "/x"}, {"XDG_CACHE_HOME": "x"}, {"HF_HOME": "~/hf"},
        {"HF_HOME": "$HOME/hf", "XDG_CACHE_HOME": "/x"}, {"HUGGINGFACE_HUB_CACHE": "/old"},
        {"HF_HUB_CACHE": "~/new", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"},
    ],
)  # fmt: skip
def test_it_is_where_the_hub_downloads_to(given: dict[str, str]) -> None:
    pytest.importorskip("huggingface_hub")
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    environ = {k: v for k, v in os.environ.items() if k not in NAMES} | given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    assert hub_cache(given) == done.stdout.rstrip("\n")


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ([], "has no config.json", "Hugging Face's format"),
        (["README.md"], "has no config.json", "Hugging Face's format"),
        (["model-Q4_K_M.gguf"], "GGUF", "safetensors checkpoint that it was made of"),
        (["consolidated.00.pth", "params.json"], "original format of Llama", "safetensors"),
        (["pytorch_model.bin"], "has no config.json", "put config.json"),
        (["final/config.json"], "has no config.json", "/final"),
        (["snapshots/abc/config.json"], "has no config.json", "snapshots/abc"),
    ],
)
@pytest.mark.parametrize("name", ["{path}", "org/name", "name"])
def test_a_folder(name, files, message, hint, tmp_path, monkeypatch):
    root = tmp_path / "org"
    folder = root / "name"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    monkeypatch.chdir(root if name == "name" else tmp_path)
    error = refused(name.format(path=folder))
    assert message in error.message
    assert str(folder) in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    "layout",
    [
        "models/Qwen--Qwen2.5-7B/snapshots/master", "models/Qwen--Qwen2.5-7B/snapshots/main",
        "models/Qwen/Qwen2___5-7B", "hub/models/Qwen/Qwen2___5-7B", "hub/Qwen/Qwen2___5-7B",
        "hub/Qwen/Qwen2.5-7B", "Qwen/Qwen2___5-7B", "Qwen/Qwen2.5-7B",
    ],
)  # fmt: skip
def test_every_layout_of_the_cache_is_found(tmp_path, layout):
    folder = make_text(tmp_path / "ms" / layout)
    model = resolve_model("Qwen/Qwen2.5-7B")
    assert (model.source.kind, model.source.checkpoint) == ("hub_cache", str(folder))
    assert (model.name, model.hub_id) == ("Qwen2.5-7B", "Qwen/Qwen2.5-7B")


@pytest.mark.parametrize("wanted", ["False", "1", "", "true", "True"])
def test_the_hub_in_use_has_the_first_cache(tmp_path, monkeypatch, wanted):
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", wanted)
    snapshot = make_text(cache_of(tmp_path, "org/tiny"))
    folder = make_text(tmp_path / "ms" / "org" / "tiny")
    first = folder if wanted.lower() == "true" else snapshot
    assert uses_modelscope() is (first is folder)
    assert resolve_model("org/tiny").source.checkpoint == str(first)


def test_revisions_of_the_folders(tmp_path, monkeypatch):
    flat = make_text(tmp_path / "ms" / "org" / "tiny")
    base = tmp_path / "ms" / "models" / "org--tiny"
    newer = make_text(base / "snapshots" / "v2")
    make_text(base)

    def found(hub_id, revision=None):
        return list(modelscope_folders(hub_id, revision))

    assert found("org/tiny", "v2") == [str(newer)]
    assert found("org/tiny", "v1.0") == []
    assert found("org/tiny") == [str(flat)]
    # None of them leaves the cache, and what is not an id is not looked up.
    for revision in ("..", "../v2", "a/../b", ".", "\0", "a\nb"):
        assert found("org/tiny", revision) == []
    for hub_id in ("tiny", "a/b/c", "../tiny", "org/..", "org/", "/tiny", "a\0/b"):
        assert found(hub_id) == []
    # The usual place is in the home.
    monkeypatch.delenv("MODELSCOPE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = make_text(tmp_path / ".cache" / "modelscope" / "hub" / "models" / "org" / "tiny")
    assert found("org/tiny") == [str(usual)]


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
