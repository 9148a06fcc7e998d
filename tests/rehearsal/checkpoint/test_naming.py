"""The names, types and shapes of a twin's tensors, and the configs of its kind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.sweep import sweep
from turbofit.core.errors import UsageError
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.model.tensors import text_tensors
from turbofit.rehearsal.checkpoint.naming import config_from, kinds, need_names
from turbofit.rehearsal.checkpoint.twin import (
    tensors,
    twin_of,
    write_model,
)

#: What a header says of each tensor.
PARTS = ("names", "types", "shapes")
#: Kinds of more than 200,000 tensors.
LARGEST = {"intern-s1-pro", "kimi-k2.5"}
#: One preset of each kind: how many tensors, and digests of their names, types and shapes, as
#: functions of Python wrote them before they were rows and names (0cd5383e), but intern-s1, which
#: had no norms of its tower's queries and keys, and the order in qwen2.5-omni-7b and CogVLM; of
#: kinds that came later, as the engines loaded them on pretend GPUs.
HEADERS = {
    "cogvlm-17b": "1155 37eb0ec2 77c1d5f0 ee08ce81",
    "cogvlm2-19b": "1189 de7f5cda 0bb98326 a2491dc2",
    "deepseek-moe-16b": "5466 ddaa4401 e7b2a0aa 7f76171d",
    "deepseek-v2-lite": "5291 738fb9ce c296142b 73823fe0",
    "glm-4.5-air": "17925 275d6c91 8e655d71 a7a0e370",
    "glm-4.7-flash": "9491 1115b730 98cf50f5 00c1a102",
    "gpt-oss-20b": "459 8bcfdd03 f9d7f561 9d4c0d5d",
    "gpt-oss-20b-bf16": "411 6ad39c2c f77102a5 59d768a7",
    "intern-s1": "37855 5cc98038 889a4143 1458bfe2",
    "intern-s1-mini": "841 ba29126d 6b00b1ed 0d557513",
    "intern-s1-pro": "290292 887d5005 2c1fd56d 579c8613",
    "internlm2.5-7b": "227 f5de1c4d 1694a28d 85cf8b05",
    "internvl-chat-v1.5": "934 4117f6eb a1a18ce2 6a3f2131",
    "internvl-chat-v1.5-awq": "1414 80195dc1 8303a186 b9b62ce1",
    "internvl2-1b": "637 bd5a9920 7884bf3b be996325",
    "internvl2-40b": "1138 c0c05831 10b92269 e57d9dd4",
    "internvl2-40b-awq": "1978 a2315000 33e58933 f4261697",
    "internvl2.5-4b-awq": "1285 496670fa f2c33572 53196b84",
    "internvl3-1b-hf": "733 c7eccdfb 3cc82102 26cb339a",
    "internvl3.5-1b": "657 4ed07dd0 1e0d63d2 8edc45d4",
    "internvl3.5-30b-a3b": "19213 16967182 6588e4ee 391e1d67",
    "internvl3.5-gpt-oss-20b-a4b": "757 1f3acfd9 0477fd01 f334971f",
    "kimi-k2.5": "208550 7efff09c 41b4fa70 49d821eb",
    "llama-3.2-11b-vision": "906 11ffc6a5 7851acb6 dbdd8c3e",
    "llava-1.5-7b": "686 ddbe5ca7 4a2403bd 8cb2f4cd",
    "llava-onevision-0.5b": "716 18b9a6e3 c3e49f2a 36767dd9",
    "llava-onevision-7b": "765 5f81a12b 52b80c01 bf08b8ab",
    "llama-2-7b": "291 7fe6a4ed 39908e87 0d2e2b97",
    "minicpm3-4b": "746 8ee8d1df a522dfbc 25bcfd95",
    "mixtral-8x7b": "995 b5e6411e 5338b594 f42d5c32",
    "phi-3.5-moe": "1957 87241fe5 57027e6a 8d85c5ae",
    "qwen2-vl-2b": "729 dda1d3a1 6c67fba1 012ed9ef",
    "qwen2-vl-2b-awq": "1121 ef256b17 87104b71 d98b6b2f",
    "qwen2.5-0.5b": "290 03d8643f 32ebfe2c e18e1e98",
    "qwen2.5-1.5b-awq": "730 5f778e88 82b7b3a7 ee428fd6",
    "qwen2.5-omni-7b": "1346 4412d82f 67a2efba deaaba51",
    "qwen2.5-vl-3b": "824 498a3293 95165830 4f49c063",
    "qwen2.5-vl-3b-awq": "1328 1aafcaeb c6bb9bc5 51e792b6",
    "qwen3-0.6b": "310 a6a16515 865b8bd6 218aeaa1",
    "qwen3-30b-a3b": "18867 fe9bd24b 545822bc cbf34097",
    "qwen3-4b-awq": "902 643d8cdb d44c00bc 09ec1079",
    "qwen3-next-80b-a3b": "74391 6da67163 596eaa9a 0577214d",
    "qwen3-omni-30b-a3b": "19743 e197a9e3 7e08a3a2 91b3e3d4",
    "qwen3-vl-2b": "625 fbc591f1 5a3e9df9 c96b1025",
    "qwen3-vl-30b-a3b": "882 3e6fc27c 1ec8bf8f ff4f3252",
    "qwen3.5-35b-a3b": "1026 54b8b745 39196c53 3f4521b4",
    "qwen3.5-4b": "723 c10db3bb 10073f55 b530bfaa",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in LARGEST else ())
        for name in HEADERS
    ],
)
def test_names_write_what_was_written_before(name: str) -> None:
    entries = list(tensors(twin_of(preset_model(name))))
    count, *digests = HEADERS[name].split()
    assert len(entries) == int(count), "tensors"
    for part, column, digest in zip(PARTS, zip(*entries, strict=True), digests, strict=True):
        found = hashlib.sha256(json.dumps(list(column)).encode()).hexdigest()[:8]
        assert found == digest, f"{part} of tensors, of which the first is {entries[0]}"


@pytest.mark.parametrize(
    "name", sweep(["qwen3.5-4b-awq", "qwen3.6-27b-awq", "qwen3.5-35b-a3b-awq"])
)
def test_layers_that_a_config_exempts_are_written_in_16_bits(name: str, tmp_path: Path) -> None:
    model = preset_model(name)
    read = resolve_model(str(write_model(twin_of(model), tmp_path)))
    assert (read.weight_bytes, read.quantization) == (model.weight_bytes, model.quantization)
    assert not read.warnings


def test_every_kind_says_where_its_config_is_from() -> None:
    for kind in kinds().values():
        assert kind.source.startswith("made by turbofit") or "://" in kind.source


def test_a_config_that_names_what_a_model_has_not_is_said() -> None:
    twin = twin_of(preset_model("qwen2.5-0.5b"))
    with pytest.raises(UsageError, match="names experts, a value that this model"):
        config_from({"num_experts": "=experts"}, twin.values)


def test_a_tensor_without_a_name_is_said() -> None:
    names = {"layers": {"at": "model.layers.", "q": "self_attn.q_proj"}}
    with pytest.raises(UsageError, match="no name for embedding, norm, head, k, v, o"):
        need_names(names, [one.role for one in text_tensors(preset_model("llama-3.1-8b").text)])
