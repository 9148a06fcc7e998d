"""Files of tensors: torch's own are read without running them, a result is whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.model.merge.cases import (
    GOLDEN,
    TINY,
    digest,
    load,
    make_adapter,
    make_base,
    merged,
)
from tests.support.waiting import HANG
from turbofit.core.errors import UsageError
from turbofit.model.merge import files
from turbofit.model.merge.merge import merge

pytestmark = pytest.mark.slow

torch: Any = None  # by `conftest`


@pytest.mark.parametrize("shards", [1, 2])
def test_torchs_own_files_give_the_same_bits(tmp_path, shards):
    base = make_base(tmp_path / "base", binary=True, shards=shards)
    if shards > 1:  # each tensor stands in both files: the index says which one counts
        paths = sorted(base.glob("*.bin"))
        parts = [torch.load(path) for path in paths]
        for path, part, other in zip(paths, parts, reversed(parts), strict=True):
            torch.save({key: tensor * 2 for key, tensor in other.items()} | part, path)
    said = merged(tmp_path, base, make_adapter(tmp_path / "lora", name="adapter_model.bin"))
    assert digest(load(tmp_path / "out")) == GOLDEN["bf16"]
    assert not any(name.endswith(".bin") for name in said.files)
    assert ("model.safetensors.index.json" in said.files) == (shards > 1)


def test_a_pickle_that_would_run_something_is_refused(tmp_path, base):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    adapter = make_adapter(tmp_path / "lora", name="adapter_model.bin")
    torch.save({"x": Evil()}, adapter / "adapter_model.bin")
    with pytest.raises(UsageError, match="cannot be read as weights alone"):
        merged(tmp_path, base, adapter)
    assert not (tmp_path / "ran").exists()


def test_where_it_may_be_written(tmp_path, monkeypatch, base, adapter):

    def refused(out, words):
        with pytest.raises(UsageError, match=words) as caught:
            merge(str(base), str(adapter), str(out))
        return caught.value.hint

    assert refused(base, "is in a source") == "name a new folder beside the sources"
    refused(base / "in", "is in a source")
    refused(tmp_path, "exists")
    refused(tmp_path / "no" / "such", "cannot be written: No such file")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "exists")
    merge(str(base), str(adapter), str(tmp_path / "out"))

    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(tmp_path / "new", "has 1000 B left")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file", "lora", "out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_breaks_off_leaves_nothing(tmp_path, monkeypatch, error, base, adapter):
    real, calls = files.Piece.made, []

    def breaks(piece, name):
        calls.append(name)
        if len(calls) == 15:
            raise error
        return real(piece, name)

    monkeypatch.setattr(files.Piece, "made", breaks)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UsageError):
        merge(str(base), str(adapter), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lora"}


_PEAK = """
import resource, sys
from turbofit.model.merge.merge import merge
merge(*sys.argv[1:3], sys.argv[1] + "-first")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(*sys.argv[3:5], sys.argv[3] + "-second")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_ram_holds_a_shard_not_the_checkpoint(tmp_path, base, adapter):
    config = {**TINY, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 8}
    wide = make_base(tmp_path / "wide", shards=6, config=config)
    modules = {f"model.layers.{i}.self_attn.q_proj": (1024, 1024) for i in range(8)}
    wide_adapter = make_adapter(tmp_path / "wide-lora", modules=modules)
    assert sum(path.stat().st_size for path in wide.glob("*.safetensors")) > 90 << 20
    paths = [str(path) for path in (base, adapter, wide, wide_adapter)]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *paths],
        capture_output=True, text=True, check=True, timeout=5 * HANG, cwd=root,
    )  # fmt: skip
    largest = max(path.stat().st_size for path in wide.glob("*.safetensors"))
    # The shard that is written, and what is mapped of the one that is read.
    assert int(done.stdout) < 2.5 * largest < 64 << 20
