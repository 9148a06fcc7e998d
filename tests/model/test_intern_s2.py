"""Intern-S2-Preview: Qwen3.5 with experts by another name, and a time series encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.header_only import write_header
from turbofit.rehearse.checkpoint.twin import tensors, twin_of, write_model

NAME = "InternS2PreviewForConditionalGeneration"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Its published number of tokens; four layers with eight experts."""
    model = preset_model("qwen3.5-35b-a3b")
    moe, delta = model.text.moe, model.text.delta
    assert moe is not None
    assert delta is not None
    text = replace(
        model.text, layers=4, vocab=251_392, moe=replace(moe, layers=4, experts=8),
        delta=replace(delta, layers=3),
    )  # fmt: skip
    twin = twin_of(replace(model, text=text, name="Intern-S2-Preview", architecture=NAME))
    made = write_model(twin, tmp_path / "Intern-S2-Preview")
    for part in made.glob("model*"):
        part.unlink()
    unread = [
        ("model.time_series.encoder.conv1.weight", "BF16", (768, 80, 3)),
        ("time_series_forecaster.head.weight", "BF16", (768, 768)),
        ("mtp.fc.weight", "BF16", (2048, 4096)),
    ]
    write_header(made / "model.safetensors", [*tensors(twin), *unread])
    return made


def test_it_is_read_as_qwen3_5_without_its_time_series(folder: Path) -> None:
    model = resolve_model(str(folder))
    like = preset_model("qwen3.5-35b-a3b")
    assert (model.architecture, model.text.architecture) == (NAME, like.text.architecture)
    assert (model.vision, model.warnings) == (like.vision, ())
    assert model.image_rule is not None
    assert model.image_rule.videos
    assert model.weight_bytes == 2 * model.parameters


def test_its_config_is_code_of_its_repository(folder: Path) -> None:
    assert not resolve_model(str(folder)).needs_remote_code
    text = (folder / "config.json").read_text()
    mapped = '{"auto_map": {"AutoConfig": "configuration_interns2_preview.InternS2PreviewConfig"},'
    (folder / "config.json").write_text(mapped + text[1:])
    assert resolve_model(str(folder)).needs_remote_code


@pytest.mark.parametrize("name", ["Intern-S2-Mobius", "shanghai/Intern-S2-Mobius-397B"])
def test_its_relative_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match="share packs of experts"):
        resolve_model(name)
