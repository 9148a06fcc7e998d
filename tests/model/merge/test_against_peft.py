"""peft's own merge beside ours, bit for bit, where peft is installed."""

from __future__ import annotations

import pytest

from tests.model.merge.cases import digest, dyadic, load, make_adapter, make_base
from tests.model.merge.golden import CASES, GOLDEN
from turbofit.model.merge.merge import merge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def peft(transformers):
    return pytest.importorskip("peft")


def by_peft(peft, transformers, base, adapter):
    import torch

    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {
        name: tensor.contiguous()
        for name, tensor in merged.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_is_bit_identical(peft, transformers, tmp_path, name):
    base_dtype, dtype, config, more = CASES[name]
    base = make_base(tmp_path / "base", dtype=base_dtype)
    extra = {key: dyadic(shape, 77, dtype) for key, shape in more.items()}
    adapter = make_adapter(tmp_path / "lora", dtype=dtype, config=config, more=extra)
    expected = by_peft(peft, transformers, base, adapter)
    merge(str(base), str(adapter), str(tmp_path / "out"))
    assert digest(load(tmp_path / "out")) == digest(expected)
    if name in GOLDEN:
        assert digest(expected) == GOLDEN[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_random_numbers_of_an_llms_size(peft, transformers, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(tmp_path / "lora", config={"lora_alpha": 13, "use_rslora": True})
    generator = torch.Generator().manual_seed(5)
    for path in (*base.glob("*.safetensors"), adapter / "adapter_model.safetensors"):
        tensors = load_file(path)
        for key, tensor in tensors.items():
            drawn = torch.randn(tensor.shape, generator=generator) * 0.05
            tensors[key] = drawn.to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    expected = by_peft(peft, transformers, base, adapter)
    merge(str(base), str(adapter), str(tmp_path / "out"))
    found = load(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
