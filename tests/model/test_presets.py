from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import turbofit
from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.presets import load_yaml, presets_dir
from turbofit.core.struct import decode, to_json
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import (
    find_preset,
    four_bits,
    known_presets,
    load_preset,
    nearest_names,
    preset_model,
    presets_with,
)

ENGINES = ("turbomind", "pytorch", "transformers")
#: Units of the largest image that published checkpoints of a kind take.
WORST = {
    "internvit": {13}, "qwen2vit": {65_536, 8_192}, "qwen2_5vit": {65_536}, "clip": {1, 5},
    "siglip": {37}, "eva_clip": {1}, "eva_clip_glm": {1}, "mllama": {4},
    "qwen3vit": {65_536, 50_176}, "glm4v": {24_576}, "phi3v": {5}, "gemma3": {1}, "llama4": {17},
    "idefics3": {17}, "moonvit": {17_856},
}  # fmt: skip


def test_every_file_has_an_alias_and_every_alias_a_file():
    aliases = load_yaml(presets_dir() / "models" / "aliases.yaml")
    files = {path.stem for path in (presets_dir() / "models").glob("*.yaml")} - {"aliases"}
    assert files == set(aliases) == set(known_presets())
    # No two presets have a name without its separators.
    names: dict[str, set[str]] = {}
    for preset_id, typed in aliases.items():
        for name in (preset_id, *typed, *(one.rpartition("/")[2] for one in typed)):
            names.setdefault("".join(filter(str.isalnum, name.lower())), set()).add(preset_id)
    assert not {name: ids for name, ids in names.items() if len(ids) > 1}


def test_presets_are_whole():
    for preset_id in known_presets():
        is_whole(preset_id)


def is_whole(preset_id: str) -> None:
    preset = load_preset(preset_id)
    assert preset.hub_id in preset.source
    assert find_preset(preset.hub_id) == find_preset(preset_id) == preset_id
    if preset.unsupported:
        with pytest.raises(UsageError) as error:
            preset_model(preset_id)
        assert len(error.value.hint) > 20
        return
    model = preset_model(preset_id)
    assert decode(to_json(model), Model, what="model") == model
    assert model.source.kind == "preset"
    assert (model.vision is None) is (model.image_rule is None)
    method = model.quantization.method if model.quantization else None
    assert (method == "awq") is preset_id.endswith("-awq")
    assert method != "awq" or load_preset(preset.base).awq == preset_id
    # Published with experts in 4 bits; 16 bits is another repository.
    assert (method == "mxfp4") is (preset_id in {"gpt-oss-20b", "gpt-oss-120b"})
    assert model.text.heads % model.text.kv_heads == 0
    if model.vision:
        assert model.vision.hidden % model.vision.heads == 0
        assert model.image_rule.worst_units() in WORST[model.vision.kind]
    assert any(engine_problem(model, engine) is None for engine in ENGINES)


@pytest.mark.parametrize(
    ("typed", "preset"),
    [
        ("internvl2-8b", "internvl2-8b"), ("InternVL2_8B", "internvl2-8b"),
        ("OpenGVLab/InternVL2-8B", "internvl2-8b"), ("opengvlab/internvl2-8b", "internvl2-8b"),
        (" InternVL2 8B ", "internvl2-8b"), ("internvl2-8b-AWQ", "internvl2-8b-awq"),
        ("qwen2-vl-7b", "qwen2-vl-7b"), ("Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl-7b"),
        ("Qwen2-VL-7B-Instruct", "qwen2-vl-7b"), ("qwen2.5-vl-7b", "qwen2.5-vl-7b"),
        ("qwen2_5-vl-7b", "qwen2.5-vl-7b"), ("internvl2-llama3-76b", "internvl2-76b"),
        ("internlm2_5-7b-chat", "internlm2.5-7b"), ("llama3.1-8b", "llama-3.1-8b"),
        ("InternVL2_5-38B-AWQ", "internvl2.5-38b-awq"),
        ("InternVL3_5-30B-A3B", "internvl3.5-30b-a3b"),
        ("llava1.5", "llava-1.5-7b"), ("llama3.2-vision", "llama-3.2-11b-vision"),
        ("LLM-Research/Llama-3.2-3B-Instruct", "llama-3.2-3b"), ("qwen2_5-1_5b", "qwen2.5-1.5b"),
        ("InternVL2_5-8B-MPO", None), ("nothing", None), ("", None), ("aliases", None),
    ],
)  # fmt: skip
def test_names_as_people_type_them(typed, preset):
    assert find_preset(typed) == preset


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("qwen3-7b", "qwen3-1.7b"),
        # A generation is known without its dot.
        ("internvl35-9b", "internvl3.5-8b"), ("qwen35-28b", "qwen3.5-27b"),
        ("InternVL25-9B", "internvl2.5-8b"), ("glm41v-9b", "glm-4.1v-9b"),
        ("Qwen/Qwen2_5-VL-9B", "qwen2.5-vl-7b"), ("llama3-9b", "llama-3-8b"),
        # Another size of a generation is nearer than another generation.
        ("qwen3.5-72b", "qwen3.5-27b"), ("qwen3.5-72b", "qwen3.5-2b"),
        ("qwen3_6-27b-fp9", "qwen3.6-27b-fp8"), ("internvl4-8b", "internvl3-8b"),
        ("qwen", "qwen2-vl-2b"), ("zzzzzz", None),
    ],
)  # fmt: skip
def test_nearest_names(typed, near):
    names = nearest_names(typed)
    assert names == [] if near is None else near in names


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("intervl2-8b", "internvl2-8b"), ("Qwen/Qwen2-VL-7B-Instrct", "qwen2-vl-7b"),
     ("Qwen3-8B-Instruct", "qwen3-8b")],
)  # fmt: skip
def test_the_nearest_name_is_the_first(typed, nearest):
    assert nearest_names(typed)[0] == nearest


def test_where_no_awq_is_published_another_format_of_four_bits_is_named():
    four = {
        "qwen3.8-27b": "qwen3.8-27b-int4", "gpt-oss-20b-bf16": "gpt-oss-20b",
        "qwen3.5-397b-a17b": "qwen3.5-397b-a17b-gptq-int4", "qwen3.6-27b": "qwen3.6-27b-awq",
        "gemma-3-12b": None, "qwen3.8-27b-fp8": None,
    }  # fmt: skip
    assert {name: four_bits(name) for name in four} == four


CHILD = """
import sys
OURS = sys.argv[1]
opened, calls = [], 0
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
import msgspec, yaml, re
def count(frame, event, arg):
    global calls
    calls += event == "call" and frame.f_code.co_filename.startswith(OURS)
del opened[:]
sys.setprofile(count)
from turbofit.model.source import resolve_model
resolve_model("internvl2-26b-awq")
sys.setprofile(None)
ours = [name for name in sys.modules if name.startswith("turbofit")]
heavy = {"torch", "transformers", "lmdeploy", "pynvml", "urllib.request", "ssl", "http.client",
         "dataclasses", "json", "difflib", "concurrent.futures"} & set(sys.modules)
read = [name for name in opened if not name.endswith(".py") and "__pycache__" not in name]
print(msgspec.json.encode([sorted(heavy), len(ours), read, calls]).decode())
"""


def test_a_preset_costs_little_and_imports_nothing_heavy():
    words = [sys.executable, "-c", CHILD, str(Path(turbofit.__file__).parent)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    heavy, ours, read, calls = json.loads(done.stdout)
    assert heavy == []
    # Counted, since milliseconds differ between machines; turbofit's alone, since those of Python's
    # imports differ between its versions: 279 calls, with nine image rules.
    assert ours <= 33
    assert [Path(name).name for name in read if name.endswith(".yaml")] == [
        "internvl2-26b-awq.yaml", "internvl2-26b.yaml",
    ]  # fmt: skip
    assert len(read) <= 4
    assert 0 < calls <= 290


def test_presets_by_words_of_their_names():
    assert all("awq" in load_preset(name).hub_id.lower() for name in presets_with(["awq"]))
    assert presets_with(["qwen2.5-vl", "7B"]) == ["qwen2.5-vl-7b", "qwen2.5-vl-7b-awq"]
    assert presets_with([]) == known_presets()
    assert "internvl2-8b" in presets_with(["opengvlab/internvl2"])
    with pytest.raises(UsageError, match="no preset has 'intervl2-8b'") as caught:
        presets_with(["intervl2-8b"])
    assert "did you mean internvl2-8b" in caught.value.hint
