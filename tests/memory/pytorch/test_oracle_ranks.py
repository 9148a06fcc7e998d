"""One rank's weights as LMDeploy's own classes make them, without memory, on several ranks."""

from __future__ import annotations

from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest
from msgspec.structs import replace

from bench.common.standin.standin_engine import shim_torchvision
from turbofit.core.model import Model, Quantization
from turbofit.memory.pytorch.constraints import tp_problem
from turbofit.memory.pytorch.weights import weight_classes
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearse.checkpoint.header_only import write_model
from turbofit.rehearse.checkpoint.twin import twin_of

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(find_spec("lmdeploy") is None, reason="needs LMDeploy"),
]

_AWQ = Quantization(method="awq", bits=4, group_size=128)
_FP8 = Quantization(method="fp8", bits=8, group_size=128)


@pytest.fixture
def first_rank(monkeypatch):
    """Bytes that the first of some ranks would hold of a folder's model."""
    pytest.importorskip("torch")
    shim_torchvision()
    import torch
    from lmdeploy.hf_configs import config_from_pretrained
    from lmdeploy.pytorch.backends.cuda.op_backend import CudaOpsBackend
    from lmdeploy.pytorch.config import DistConfig, QuantizationConfig
    from lmdeploy.pytorch.configurations.builder import AutoModelConfigBuilder
    from lmdeploy.pytorch.distributed import DistContext, DistGroup, get_dist_manager
    from lmdeploy.pytorch.model_inputs import BuildModelContext
    from lmdeploy.pytorch.models.patch import build_model_from_hf_config

    def unbuilt(*_, **__):
        op = MagicMock()
        del op.build_expert_storage  # of expert parallelism alone
        return op

    monkeypatch.setattr(CudaOpsBackend, "build_op", classmethod(unbuilt))
    monkeypatch.setattr("lmdeploy.utils.is_bf16_supported", lambda *_: True)

    def held(folder, tp: int) -> int:
        config = config_from_pretrained(str(folder), trust_remote_code=False)
        made = AutoModelConfigBuilder.build(config, str(folder), tp=tp)
        group = DistGroup(rank=0)
        ranks = DistContext(
            dist_config=DistConfig(tp=tp), tp_group=group, attn_tp_group=group,
            mlp_tp_group=group, moe_tp_group=group,
        )  # fmt: skip
        with get_dist_manager().context(ranks):
            model = build_model_from_hf_config(
                made.hf_config or config, torch.bfloat16, torch.device("meta"),
                build_model_ctx=BuildModelContext(
                    quant_config=QuantizationConfig.from_config(config)
                ),
            )  # fmt: skip
        parameters = {id(one): one for one in model.parameters()}.values()
        return sum(one.numel() * one.element_size() for one in parameters)

    return held


def small(preset: str, quantization: Quantization | None) -> Model:
    """A preset of two layers with few experts, and a head of its own."""
    model = preset_model(preset)
    moe = model.text.moe and replace(model.text.moe, layers=2, experts=8)
    text = replace(model.text, layers=2, moe=moe, tie_word_embeddings=False)
    vision = model.vision and replace(model.vision, layers=2)
    return replace(model, text=text, vision=vision, quantization=quantization)


@pytest.mark.parametrize(
    ("preset", "quantization", "over"),
    [
        ("qwen3-30b-a3b", None, 0),
        ("qwen3-30b-a3b", _FP8, 0),
        ("mixtral-8x7b", _FP8, 0),
        ("qwen2.5-3b", _AWQ, 0),
        ("qwen3-8b", _FP8, 0),
        # Biases of the tower's sharded layers are counted whole.
        ("qwen2-vl-2b", _AWQ, 64 << 10),
    ],
)
def test_weights_are_the_first_ranks(first_rank, tmp_path, preset, quantization, over):
    folder = write_model(twin_of(small(preset, quantization)), tmp_path / "m")
    model = resolve_model(str(folder))
    degrees = [tp for tp in (1, 2, 4, 8) if tp_problem(model, tp) is None]
    assert degrees[:3] == [1, 2, 4]
    for tp in degrees:
        told, seen = sum(weight_classes(model, tp).values()), first_rank(folder, tp)
        assert 0 <= told - seen <= over, tp
