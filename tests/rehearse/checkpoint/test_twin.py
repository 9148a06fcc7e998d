"""Of which models a stand-in checkpoint is made, and what is read back of it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.sweep import sweep
from turbofit.cli.main import main
from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.model.families.registry import VISION_READERS
from turbofit.model.families.text import TEXT_ARCHITECTURES
from turbofit.model.presets import known_presets, load_preset, preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.kinds import kinds, rows_of
from turbofit.rehearse.checkpoint.twin import need_stand_in, tensors, twin_of, write_model


def test_int4_of_every_layer_has_no_twin() -> None:
    """Only experts are packed in one, so that the engine died of a model that nobody has."""
    packed = Quantization(method="compressed-tensors", bits=4, group_size=32)
    with pytest.raises(UsageError, match="no stand-in checkpoint is made for compressed-tensors"):
        twin_of(replace(preset_model("llama-3.1-8b"), quantization=packed))
    assert twin_of(preset_model("kimi-k2.5")).packing == "compressed-tensors"


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


@pytest.mark.parametrize("name", ["cogvlm-17b", "llava-v1.6-vicuna-7b"])
def test_a_model_without_a_stand_in_is_refused_before_it_is_planned(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plans(*_: object, **__: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("turbofit.planning.plan.best_plan", plans)
    on = ["--on", "2xrtx3090"]
    for words in (
        ["rehearse", name], ["plan", name, "--rehearse"], ["serve", name, "--pretend"],
        ["serve", "internvl2-1b", name, "--pretend"],
        ["calibrate", name, "--pretend"], ["tune", name, "--pretend"],
    ):  # fmt: skip
        assert main([*words, *on]) == 2, words
        said = capsys.readouterr().err
        assert "error: no stand-in checkpoint is made for" in said
        assert "warning" not in said


def test_weights_on_disk_need_no_stand_in(tmp_path: Path) -> None:
    model = preset_model("cogvlm-17b")
    (tmp_path / "model.safetensors").touch()
    source = replace(model.source, kind="folder", checkpoint=str(tmp_path))
    need_stand_in(replace(model, source=source))
    with pytest.raises(UsageError, match="no stand-in checkpoint"):
        need_stand_in(model)


#: Kinds of more than 200,000 tensors.
LARGEST = {"intern-s1-pro", "kimi-k2.5"}
#: Of one preset of each kind: digests of names, types and shapes, as functions of Python wrote them
#: before they were rows (0cd5383e).
HEADERS = {
    "deepseek-moe-16b": "683ee4a6c3193234", "deepseek-v2-lite": "bf4720d7ebc0ddbe",
    "glm-4.5-air": "46de61fad58a878d", "glm-4.7-flash": "456e63f81f21f7be",
    "gpt-oss-20b": "429f857d4da2b46e", "gpt-oss-20b-bf16": "2007db0171e9b527",
    "intern-s1": "d2fe807f4570802b", "intern-s1-mini": "b7ab0a8fd84a8ee8",
    "intern-s1-pro": "4508afcbc47fec44", "internlm2.5-7b": "513476db637ec7f9",
    "internvl-chat-v1.5": "aaddde90714663bd", "internvl-chat-v1.5-awq": "3234133a8dcf7e90",
    "internvl2-1b": "f5da36afd7a310cc", "internvl2-40b": "2fa16ab97e634b3c",
    "internvl2-40b-awq": "6732a41c8790a2e5", "internvl2.5-4b-awq": "efb4c1166df7fd0b",
    "internvl3-1b-hf": "a8c51fa44f57d91e", "internvl3.5-1b": "c4dad465c359fc02",
    "internvl3.5-30b-a3b": "b6cf4f7f6429bf84", "internvl3.5-gpt-oss-20b-a4b": "03e6027af99fe6e3",
    "kimi-k2.5": "d10a8a1b2ec485ed", "llama-2-7b": "c7caa20e9d8748f9",
    "minicpm3-4b": "ce1454d0ebdd0750", "mixtral-8x7b": "91b827df9bea0d1c",
    "phi-3.5-moe": "5cd750ad9f5acb69", "qwen2-vl-2b": "134825088960bcd6",
    "qwen2-vl-2b-awq": "4e627d04bd33b916", "qwen2.5-0.5b": "4a780f26beab1995",
    "qwen2.5-1.5b-awq": "c072dacd54be9b6e", "qwen2.5-omni-7b": "59d09dd0833c8ce1",
    "qwen2.5-vl-3b": "7c290a0bccb800bf", "qwen2.5-vl-3b-awq": "2b302fda77e5db76",
    "qwen3-0.6b": "cec970947df80e2c", "qwen3-30b-a3b": "1e2a997253a5cdf6",
    "qwen3-4b-awq": "5c12ccf03140cdf3", "qwen3-next-80b-a3b": "cb11c50dd5d4c73b",
    "qwen3-omni-30b-a3b": "d7ae7c53b82c58e0", "qwen3-vl-2b": "9a78798a60e128fa",
    "qwen3-vl-30b-a3b": "6a3365864dda3a9c", "qwen3.5-35b-a3b": "648cfcb1484ab19a",
    "qwen3.5-4b": "02becb145799df7a",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in LARGEST else ())
        for name in HEADERS
    ],
)
def test_rows_write_what_was_written_before(name: str) -> None:
    entries = list(tensors(twin_of(preset_model(name))))
    assert hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16] == HEADERS[name]


@pytest.mark.parametrize(
    "name", sweep(["qwen3.5-4b-awq", "qwen3.6-27b-awq", "qwen3.5-35b-a3b-awq"])
)
def test_layers_that_a_config_exempts_are_written_in_16_bits(name: str, tmp_path: Path) -> None:
    model = preset_model(name)
    read = resolve_model(str(write_model(twin_of(model), tmp_path)))
    assert read.weight_bytes == model.weight_bytes
    assert read.quantization == model.quantization
    assert not read.warnings


def test_every_kind_says_where_its_config_is_from() -> None:
    for kind in kinds().values():
        assert kind.source.startswith("made by turbofit") or "://" in kind.source


def test_a_row_that_names_what_a_model_has_not_is_said() -> None:
    twin = twin_of(preset_model("qwen2.5-0.5b"))
    with pytest.raises(UsageError, match="names experts, which this model has not"):
        list(rows_of(["tensor x experts"], {}, twin.values, ""))
