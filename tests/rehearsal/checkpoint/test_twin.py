"""The models of which a stand-in checkpoint is made, and what is read back of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from turbofit.cli.main import main
from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.model.families.registry import VISION_READERS
from turbofit.model.families.text import TEXT_ARCHITECTURES
from turbofit.model.presets import known_presets, load_preset, preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.naming import kinds
from turbofit.rehearsal.checkpoint.twin import (
    config_of,
    need_stand_in,
    twin_of,
    write_model,
)


def test_int4_of_every_layer_has_no_twin() -> None:
    """Only experts are packed in one, so that the engine died of a model that nobody has."""
    packed = Quantization(method="compressed-tensors", bits=4, group_size=32)
    with pytest.raises(UsageError, match="no stand-in checkpoint is made for compressed-tensors"):
        twin_of(replace(preset_model("llama-3.1-8b"), quantization=packed))
    assert config_of(twin_of(preset_model("kimi-k2.5")))["text_config"]["quantization_config"]


PAGE = (Path(__file__).parents[3] / "docs" / "pretend.md").read_text(encoding="utf-8")


def test_the_page_lists_every_architecture_without_a_stand_in() -> None:
    listed = re.search(r"<!-- without a stand-in.*?-->(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert listed is not None
    without = set(re.findall(r"`(\w+)`", listed[1]))
    assert without == {*VISION_READERS, *TEXT_ARCHITECTURES} - set(kinds())
    for name in known_presets():
        if load_preset(name).unsupported is not None:
            continue
        model = preset_model(name)
        try:
            twin_of(model)
            made = True
        except UsageError:
            made = False
        named = not without.isdisjoint((model.architecture, model.text.architecture))
        packed = model.quantization is not None and not made
        assert made != named or packed, name


@pytest.mark.parametrize("name", ["gemma-3-4b", "llava-v1.6-vicuna-7b"])
def test_a_model_without_a_stand_in_is_refused_before_it_is_planned(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plans(*_: object, **__: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("turbofit.planning.plan.best_plan", plans)
    on = ["--on", "2xrtx3090"]
    for words in (
        ["rehearse", name], ["plan", name, "--rehearse"], ["serve", name, "--pretend"],
        ["calibrate", name, "--pretend"], ["tune", name, "--pretend"],
    ):  # fmt: skip
        assert main([*words, *on]) == 2, words
        said = capsys.readouterr().err
        assert "error: no stand-in checkpoint is made for" in said
        assert "warning" not in said


def test_weights_on_disk_need_no_stand_in(tmp_path: Path) -> None:
    model = preset_model("llava-v1.6-vicuna-7b")
    (tmp_path / "model.safetensors").touch()
    source = replace(model.source, kind="folder", checkpoint=str(tmp_path))
    need_stand_in(replace(model, source=source))
    with pytest.raises(UsageError, match="no stand-in checkpoint"):
        need_stand_in(model)


@pytest.mark.parametrize("name", ["cogvlm-17b", "cogvlm2-19b"])
def test_a_decoder_with_its_tower_in_one_kind_reads_as_its_preset(
    name: str, tmp_path: Path
) -> None:
    model = preset_model(name)
    read = resolve_model(str(write_model(twin_of(model), tmp_path)))
    assert (read.text, read.vision, read.image_rule) == (model.text, model.vision, model.image_rule)
    assert read.weight_bytes == model.weight_bytes
