"""Checkpoints without weights: whole headers, the parameters of a preset, and what has none."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from tests.rehearsal.checkpoint.test_naming import HEADERS, LARGEST
from tests.support.checkpoints import write_checkpoint
from tests.sweep import sweep
from turbofit.model.folder import FolderFiles
from turbofit.model.presets import preset_model
from turbofit.rehearsal.checkpoint.twin import tensors, twin_of

pytestmark = pytest.mark.slow

#: Counted in `tests/model/test_parameters.py`; of each kind see `test_naming.py`.
COUNTED = (
    "internvl2-8b", "internvl2-26b", "internvl3.5-8b", "qwen2-vl-72b", "qwen2.5-vl-7b",
    "qwen3-vl-8b", "mixtral-8x7b", "qwen3-vl-30b-a3b", "qwen2.5-omni-7b", "qwen3-omni-30b-a3b",
)  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_of_the_preset(name: str) -> None:
    preset = preset_model(name)
    assert sum(prod(shape) for _, _, shape in tensors(twin_of(preset))) == preset.parameters


def test_a_header_only_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint("qwen2-vl-2b", tmp_path / "m")
    (path,) = folder.glob("*.safetensors")
    assert path.stat().st_blocks * 512 < 200_000
    header = FolderFiles(str(folder)).header(path.name)
    assert header["visual.patch_embed.proj.weight"].shape == (1280, 3, 2, 14, 14)
    total = sum(tensor.bytes for tensor in header.values())
    assert total == 2 * 2_208_985_600
    assert total < path.stat().st_size < total + 200_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert (folder / "preprocessor_config.json").exists()


@pytest.mark.parametrize("name", sweep(sorted(set(HEADERS) - LARGEST), 6))
def test_a_kind_is_written(name: str, tmp_path: Path) -> None:
    assert any(write_checkpoint(name, tmp_path).glob("*.safetensors"))
