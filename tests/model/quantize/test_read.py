"""What is found in a checkpoint of 4 bits: whole ones, damaged ones, and what LMDeploy reads."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.model.quantize.made import config_of, make_plain, packed_tensors, write_packed
from tests.support.tiny_checkpoints import LLAMA
from turbofit.core.errors import UsageError
from turbofit.model.quantize.read import read_result, unpacked
from turbofit.model.source import resolve_model

MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch")
    return make_plain(tmp_path_factory.mktemp("plain") / "m")


@pytest.fixture
def read(plain, tmp_path):
    def read(tensors=None, config=None):
        out = write_packed(plain, tmp_path / "out", tensors, config)
        return read_result(resolve_model(str(plain)), str(out))

    return read


def test_a_whole_result_is_read_and_near_its_source(read) -> None:
    reading = read()
    assert (reading.good, reading.problems, reading.compared) == (True, (), True)
    assert reading.engines["turbomind"] == ""
    assert "experts" in reading.engines["pytorch"]
    assert (reading.packed, reading.group_size) == (14, 128)
    assert 0.05 < reading.worst_error < 0.2
    kinds = {layer.name: (layer.count, layer.packed) for layer in reading.layers}
    assert kinds["model.layers.N.mlp.down_proj.weight_packed"] == (2, True)
    assert kinds["lm_head.weight"] == (1, False)


def test_integers_are_unpacked_lowest_bits_first() -> None:
    torch = pytest.importorskip("torch")
    words = torch.tensor([[0x76543210, -1]], dtype=torch.int32)
    assert unpacked(words).tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1, *[7] * 8]]


@pytest.mark.parametrize(
    ("factor", "said"), [(float("nan"), "nan"), (0.0, "is 0.0"), (30.0, "16-bit weights")]
)
def test_a_damaged_scale_is_named_with_its_place(read, plain, factor, said) -> None:
    tensors = packed_tensors(plain)
    tensors[f"{MODULE}.weight_scale"][3, 2] *= factor
    reading = read(tensors)
    (problem,) = reading.problems
    assert not reading.good
    assert problem.startswith(f"{MODULE}.weight_packed: ")
    assert "output 3, group 2" in problem
    assert said in problem


def test_a_group_of_zeros_is_no_damage(read, plain) -> None:
    """GPTQ makes zeros of weights whose inputs were zero in all samples."""
    tensors = packed_tensors(plain)
    tensors[f"{MODULE}.weight_packed"][3, :16] = -0x77777778  # eight times 8, which is 0
    assert read(tensors).problems == ()


def test_a_missing_tensor_is_named(read, plain) -> None:
    tensors = packed_tensors(plain)
    del tensors["model.norm.weight"], tensors[f"{MODULE}.weight_scale"]
    problems = read(tensors).problems
    assert any(problem.startswith("model.norm.weight ") for problem in problems)
    assert any(problem.startswith(f"{MODULE}.weight_packed ") for problem in problems)


def test_a_buffer_and_a_tied_head_are_no_missing_tensors(plain, tmp_path) -> None:
    """Old checkpoints have inv_freq, and some a copy of the tied head; Transformers saves none."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(plain, source)
    stored = load_file(source / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(64)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    tensors = packed_tensors(plain)
    del tensors["lm_head.weight"]
    for tied, missing in ((True, []), (False, ["lm_head.weight"])):
        config = config_of() | {"tie_word_embeddings": tied}
        source.joinpath("config.json").write_text(
            json.dumps({**LLAMA, "torch_dtype": "bfloat16", "tie_word_embeddings": tied})
        )
        out = write_packed(source, tmp_path / str(tied), tensors, config)
        problems = read_result(resolve_model(str(source)), str(out)).problems
        assert [problem.split()[0] for problem in problems] == missing


def test_scales_of_another_group_than_the_config_says_are_named(read, plain) -> None:
    tensors = packed_tensors(plain)
    name = f"{MODULE}.weight_scale"
    tensors[name] = tensors[name].repeat_interleave(2, dim=1)
    (problem,) = read(tensors).problems
    assert "(256, 8), not (256, 4)" in problem


def test_a_file_that_is_missing_beside_the_weights_is_named(read, plain, tmp_path) -> None:
    out = write_packed(plain, tmp_path / "other")
    (out / "tokenizer.json").unlink()
    reading = read_result(resolve_model(str(plain)), str(out))
    assert [problem.split()[0] for problem in reading.problems] == ["tokenizer.json"]


def test_configs_that_no_engine_reads_are_refused_by_name(read, plain, tmp_path) -> None:
    two = config_of(group_1={"targets": ["Linear"]})
    for number, (config, said) in enumerate(((two, "2 groups"), (config_of(64), "groups of 64"))):
        out = write_packed(plain, tmp_path / str(number), config=config)
        with pytest.raises(UsageError) as caught:
            read_result(resolve_model(str(plain)), str(out))
        assert said in caught.value.message
    with pytest.raises(UsageError) as caught:
        read_result(resolve_model(str(plain)), str(plain))
    assert "16 bits" in caught.value.message
