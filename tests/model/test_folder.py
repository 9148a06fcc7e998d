"""A checkpoint in a folder: shards, their index, and what is not a file."""

from __future__ import annotations

import json
import os

import pytest

from tests.support.checkpoints import make_text, write_safetensors
from tests.support.tiny_checkpoints import llama_tensors, make
from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


def test_sharded(tmp_path):
    folder = tmp_path / "tiny"
    make(folder, tensors={})
    names = list(llama_tensors())
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        write_safetensors(folder / file, {name: llama_tensors()[name] for name in part})
    index = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    assert resolve_model(str(folder)).weight_bytes == 2 * resolve_model(str(folder)).parameters
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UsageError, match="model-2"):
        resolve_model(str(folder))


def test_an_index_that_names_what_no_file_holds(tmp_path):
    folder = tmp_path / "tiny"
    make(folder)
    index = {"weight_map": dict.fromkeys([*llama_tensors(), "ghost"], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="ghost"):
        resolve_model(str(folder))


def test_a_pipe_is_not_a_config(tmp_path):
    """A named pipe would block for ever."""
    folder = make_text(tmp_path / "x")
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "tokenizer_config.json")
    os.mkfifo(folder / "preprocessor_config.json")
    assert resolve_model(str(folder)).parameters
