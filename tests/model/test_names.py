"""What people type for a model beside folders, hub ids and presets."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.model import hub
from turbofit.model.names import names_a_model, read_name, unrunnable
from turbofit.model.presets import load_preset
from turbofit.model.source import resolve_model

ID = "OpenGVLab/InternVL3-8B"


@pytest.mark.parametrize(
    ("typed", "revision"),
    [
        (f"https://huggingface.co/{ID}", None),
        (f"https://huggingface.co/{ID}/tree/v1.0", "v1.0"),
        (f"https://huggingface.co/{ID}/tree/refs%2Fpr%2F5", "refs/pr/5"),
        (f"https://huggingface.co/{ID}/blob/main/config.json#L3", None),
        (f"https://huggingface.co/{ID}/resolve/abc123/config.json?download=true", "abc123"),
        (f"https://huggingface.co/{ID}/commit/abc123", "abc123"),
        (f"https://huggingface.co/{ID}.git", None),
        (f"https://huggingface.co/api/models/{ID}", None),
        (f"hf.co/{ID}", None),
        (f"hf://{ID}", None),
        (f"hf://{ID}@v2/config.json", "v2"),
        (f"https://hf-mirror.com/{ID}/tree/main", None),
        (f"https://modelscope.cn/models/{ID}/files?version=v3", "v3"),
        (f"https://www.modelscope.cn/models/{ID}/file/view/v3/config.json", "v3"),
        (f"modelscope://{ID}", None),
        (f"{ID}@v2", "v2"),
        (f"{ID}/", None),
        (f'"{ID}"', None),
    ],
)  # fmt: skip
def test_addresses_name_the_hub_id_and_its_revision(typed: str, revision: str | None) -> None:
    found = read_name(typed)
    assert (found.text, found.revision) == (ID, revision)
    model = resolve_model(typed)
    assert (model.name, model.hub_id, model.revision) == ("InternVL3-8B", ID, revision)
    if revision:  # two of them are one too many
        assert resolve_model(typed, revision=revision) == model
        with pytest.raises(UsageError, match=f"names the revision {revision}, and --revision x"):
            resolve_model(typed, revision="x")


def test_an_address_of_another_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    page = f"https://modelscope.cn/models/{ID}"
    assert "LMDEPLOY_USE_MODELSCOPE=True" in resolve_model(page).warnings[0]
    assert read_name(f"https://hf-mirror.com/{ID}").notes == ()
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "True")
    assert read_name(page).notes == ()
    assert "ModelScope" in read_name(f"hf.co/{ID}").notes[0]
    with pytest.raises(UsageError, match=r"models\.example\.org is no hub"):
        read_name(f"https://models.example.org/{ID}/tree/v1")


@pytest.mark.parametrize(
    "typed",
    [
        "https://huggingface.co/datasets/lmms-lab/COCO", "https://huggingface.co/spaces/org/demo",
        "https://huggingface.co/OpenGVLab", "https://modelscope.cn/datasets/a/b",
        "https://github.com/OpenGVLab/InternVL", "s3://bucket/InternVL3-8B", "https://[bad",
    ],
)  # fmt: skip
def test_addresses_of_no_model(typed: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_model(typed)
    assert "ORG/NAME" in error.value.hint


@pytest.mark.parametrize(
    ("typed", "cause", "hint"),
    [
        ("qwen2.5vl:7b", "no model is known", "did you mean qwen2.5-vl-7b, qwen2.5-vl-7b-awq"),
        ("nvidia/Qwen3.8-27B-NVFP4", "it is NVFP4", "qwen3.8-27b-int4 is in 4 bits"),
        ("moondream:1.8b", "does not run Moondream", "smolvlm2-500m"),
        ("unsloth/Qwen2.5-VL-7B-Instruct:Q4_K_M", "it is GGUF", "qwen2.5-vl-7b-awq"),
        (f"{ID}:latest", "no folder", "internvl3-8b"),
    ],
)
def test_a_name_with_a_tag_is_none_of_a_hub(typed: str, cause: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_model(typed)
    assert cause in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize(
    "folder", ["C:\\models\\", "d:/m/", ".\\", r"\\nas\m" "\\", "~/models/", "/data/", "a/b/"]
)
def test_a_path_that_is_not_here_is_the_preset_that_it_ends_in(folder: str, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = resolve_model(f"{folder}InternVL3-8B")
    assert model.source.where == "internvl3-8b"
    assert "is here, so it is planned by its name as internvl3-8b" in model.warnings[0]
    assert model.hub_id != ID  # its commands do not download the preset's checkpoint
    with pytest.raises(UsageError, match=r"no folder .* is here"):
        resolve_model(f"{folder}mine")


@pytest.mark.parametrize(
    ("hub_id", "preset", "method"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct-GPTQ-Int4", "qwen2.5-vl-7b", "gptq"),
        ("RedHatAI/Qwen2.5-VL-7B-Instruct-quantized.w4a16", "qwen2.5-vl-7b", "compressed-tensors"),
        ("Qwen/Qwen3-8B-FP8", "qwen3-8b", "fp8"),
        ("cyankiwi/Qwen3.5-9B-AWQ-4bit", "qwen3.5-9b", "compressed-tensors"),
        ("OpenGVLab/InternVL2_5-8B-MPO", "internvl2.5-8b", None),
        ("huihui-ai/Qwen2.5-VL-7B-Instruct-abliterated", "qwen2.5-vl-7b", None),
    ],
)
def test_siblings_are_planned_from_the_preset_and_say_what_is_assumed(hub_id, preset, method):
    model = resolve_model(hub_id)
    base = load_preset(preset)
    assert (model.hub_id, model.source.sizes, model.text) == (hub_id, "estimate", base.text)
    assert f"assumed to be those of the preset {preset}" in model.warnings[0]
    stored = model.quantization
    assert (stored.method if stored else None) == method
    plain = resolve_model(base.hub_id).weight_bytes
    if stored is None:
        assert model.weight_bytes == plain
    else:
        assert plain * stored.bits / 16 < model.weight_bytes < plain
        assert "need more" in model.warnings[0]
    if "abliterated" in hub_id:
        assert "'abliterated' is read as the name of a fine-tune" in model.warnings[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("unsloth/Qwen2.5-VL-7B-Instruct-GGUF", "GGUF"),
        ("unsloth/Llama-3.2-11B-Vision-Instruct-unsloth-bnb-4bit", "bitsandbytes"),
        ("Qwen/Qwen2.5-VL-7B-Instruct-GPTQ-Int8", "GPTQ in 8 bits"),
        ("RedHatAI/Qwen2.5-VL-7B-Instruct-FP8-Dynamic", "fp8 in compressed-tensors"),
        ("RedHatAI/Qwen3-VL-8B-Instruct-FP8", "in blocks of 128 x 128 alone"),
        ("nvidia/Llama-3.1-8B-Instruct-NVFP4", "NVFP4"),
        ("mlx-community/Qwen2.5-VL-7B-Instruct-MLX-4bit", "MLX"),
        ("mlx-community/Qwen2.5-VL-7B-Instruct-4bit", "MLX"),
        ("somebody/InternVL3-8B-lora", "turbofit merge"),
        ("cpatonn/InternVL3_5-14B-AWQ-8bit", "compressed-tensors in 8 bits"),
        ("Intel/Qwen3-8B-int4-AutoRound", "by its name it is int4-autoround"),
    ],
)
def test_what_no_engine_runs_is_said_by_its_name(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=r"LMDeploy 0\.18 does not run") as error:
        resolve_model(name)
    assert why in error.value.message
    assert "is the checkpoint" in error.value.hint
    assert unrunnable(ID) is None


@pytest.mark.parametrize("name", ["./internlm2_5-7b-chat-w8a8", "InternVL2-2B-W8A8-Vision"])
def test_a_folders_8_bits_may_be_lmdeploys_own(name: str) -> None:
    with pytest.raises(UsageError, match=r"no folder .* is here; .* \(smooth_quant\)") as error:
        resolve_model(name)
    assert "is the checkpoint" in error.value.hint
    assert "GPTQ" in str(unrunnable("qwen2.5-vl-7b-gptq-int8"))
    for theirs in ("RedHatAI/Qwen3-8B-quantized.w8a8", "qwen3-8b-quantized.w8a8"):
        assert "8 bits, of which it reads 4 bits alone" in str(unrunnable(theirs))


@pytest.mark.parametrize(
    ("hub_id", "hint"),
    [
        # Names that say another shape are not guessed.
        ("OpenGVLab/InternVL3_5-8B-HF", "has a similar name"),
        ("Qwen/Qwen2.5-7B-Instruct-1M", "has a similar name"),
        ("somebody/Qwen2.5-VL-7B-Reward", "has a similar name"),
        ("Qwen/Qwen3-VL-8B-Omni", "has a similar name"),
        ("THUDM/cogvlm2-llama3-chat-19B-int4", "has a similar name"),
        # What a config alone decides is not refused by a name, nor what an unknown model stores.
        ("Qwen/Qwen3.6-27B-GPTQ-Int4", "its config.json says whether LMDeploy runs it"),
        ("Qwen/Qwen3-VL-1999B-Instruct-FP8", ""),
    ],
)
def test_what_a_name_does_not_decide_a_hub_is_asked(hub_id: str, hint: str) -> None:
    with pytest.raises(UsageError, match="forbids the network") as error:
        resolve_model(hub_id)
    assert hint in error.value.hint


def test_a_hub_that_answers_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[UsageError] = [
        hub.HubUnreachableError("no network", hint=""),
        hub.NotGivenError("the hub has no such model", hint="check the name"),
    ]

    def answered(*_: object) -> None:
        raise answers[-1]

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub.HubFiles, "read", answered)
    with pytest.raises(UsageError, match="no such model"):
        resolve_model("OpenGVLab/InternVL3-8B-Instruc")
    answers.pop()
    assert resolve_model("OpenGVLab/InternVL3-8B-Instruc").source.sizes == "estimate"


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("internvl2-8b", True),
        ("Org/New-Model", True),
        ("https://hf.co/OpenGVLab/InternVL3-8B", True),
        ("Qwen2.5-VL-7B-GGUF", True),
        ("4xrtx3090", False),
        ("what", False),
    ],
)
def test_a_word_that_names_a_model(word: str, named: bool) -> None:
    assert names_a_model(word) is named


def test_what_4bit_means_is_said_by_the_owner_or_the_option() -> None:
    name = "InternVL3-8B-4bit"
    assert "bitsandbytes" in str(unrunnable(f"somebody/{name}"))
    for owner, stored in (("lmdeploy", None), ("internlm", None), ("somebody", "awq")):
        model = resolve_model(f"{owner}/{name}", model_format=stored)
        assert model.quantization
        assert (model.quantization.method, model.quantization.bits) == ("awq", 4)
        assert "assumed to be those of the preset internvl3-8b" in model.warnings[0]
    with pytest.raises(UsageError, match="is not in the local hub cache"):
        resolve_model("lmdeploy/llama2-chat-70b-4bit", model_format="awq")
