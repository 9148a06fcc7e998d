"""One rank of several as LMDeploy's own classes make and load it, without memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from msgspec.structs import replace

from tests.memory.pytorch.test_account import tp_problem
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Settings
from turbofit.memory.pytorch.cache import draft_block, state_bytes
from turbofit.memory.pytorch.weights import own_draft_weights, weight_classes
from turbofit.model.drafts import with_draft
from turbofit.model.families.engines import engine_problem
from turbofit.model.presets import preset_model
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import twin_of, write_model

pytestmark = pytest.mark.lmdeploy

_AWQ = Quantization(method="awq", bits=4, group_size=128)
_FP8 = Quantization(method="fp8", bits=8, group_size=128)


@pytest.fixture
def rank(monkeypatch):
    """Builds one rank of some from a folder and, where asked to, loads its tensors."""
    pytest.importorskip("torch")
    import torch
    from lmdeploy.hf_configs import config_from_pretrained
    from lmdeploy.pytorch.backends.cuda.op_backend import CudaOpsBackend
    from lmdeploy.pytorch.config import DistConfig, QuantizationConfig
    from lmdeploy.pytorch.configurations.builder import AutoModelConfigBuilder
    from lmdeploy.pytorch.distributed import DistContext, DistGroup, get_dist_manager
    from lmdeploy.pytorch.model_inputs import BuildModelContext
    from lmdeploy.pytorch.models.patch import build_model_from_hf_config

    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
             "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip
    meta = torch.device("meta")

    def unbuilt(*_, **__):
        op = MagicMock()
        del op.build_expert_storage  # of expert parallelism alone
        return op

    monkeypatch.setattr(CudaOpsBackend, "build_op", classmethod(unbuilt))
    for module in ("utils", "pytorch.configurations.qwen3_5"):
        monkeypatch.setattr(f"lmdeploy.{module}.is_bf16_supported", lambda *_: True)
    latents = "lmdeploy.pytorch.configurations.deepseek_v2.flash_mla_available"
    monkeypatch.setattr(latents, lambda: True)  # as a draft of latents needs it

    def stored(folder: Path):
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            del header["__metadata__"]
            for name, one in header.items():
                yield name, torch.empty(one["shape"], dtype=types[one["dtype"]], device=meta)

    def made(folder: Path, tp: int, number: int = 0, *, load: bool = False, **draft):
        config = config_from_pretrained(str(folder), trust_remote_code=False)
        built = AutoModelConfigBuilder.build(config, str(folder), tp=tp, **draft)
        group = DistGroup(rank=number)
        ranks = DistContext(
            rank=number, dist_config=DistConfig(tp=tp), tp_group=group, attn_tp_group=group,
            mlp_tp_group=group, moe_tp_group=group,
        )  # fmt: skip
        packing = QuantizationConfig.from_config(config)
        with get_dist_manager().context(ranks):
            model = build_model_from_hf_config(
                built.hf_config or config, torch.bfloat16, meta,
                build_model_ctx=BuildModelContext(quant_config=packing),
            )  # fmt: skip
            if load:
                renamed = getattr(model, "rename_weight", str)
                model.load_weights((renamed(name), one) for name, one in stored(folder))
        parameters = {id(one): one for one in model.parameters()}.values()
        return sum(one.numel() * one.element_size() for one in parameters)

    return made


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
        ("llama-3.1-8b", _AWQ, 0),
        ("qwen3-8b", _FP8, 0),
        # Biases of the tower's sharded layers are counted whole.
        ("qwen2-vl-7b", _AWQ, 64 << 10),
        ("internvl3-8b-hf", None, 64 << 10),
        ("intern-s1-mini", None, 64 << 10),
    ],
)
def test_weights_are_the_first_ranks(rank, tmp_path, preset, quantization, over):
    folder = write_model(twin_of(small(preset, quantization)), tmp_path / "m")
    model = resolve_model(str(folder))
    degrees = [tp for tp in (1, 2, 4, 8) if tp_problem(model, tp) is None]
    assert degrees[:3] == [1, 2, 4]
    for tp in degrees:
        assert 0 <= sum(weight_classes(model, tp).values()) - rank(folder, tp) <= over, tp


@pytest.mark.parametrize(
    ("preset", "quantization"),
    [
        ("qwen3-4b", _FP8), ("qwen3-8b", _FP8), ("qwen2.5-0.5b", _FP8), ("qwen2.5-3b", _AWQ),
        ("qwen2.5-14b", _AWQ), ("qwen2-vl-7b", _AWQ), ("qwen3-30b-a3b", _FP8),
        ("internvl3-8b-hf", _AWQ),
    ],
)  # fmt: skip
def test_degrees_that_are_planned_are_those_that_load(rank, tmp_path, preset, quantization):
    folder = write_model(twin_of(small(preset, quantization)), tmp_path / "m")
    model = resolve_model(str(folder))
    unpacked = replace(model, quantization=None)
    for tp in (1, 2, 4, 8):
        if tp_problem(unpacked, tp):
            continue
        problem = engine_problem(model, "pytorch") or tp_problem(model, tp)
        try:
            for number in {0, tp - 1}:
                rank(folder, tp, number, load=True)
        except (RuntimeError, AssertionError, KeyError):
            assert problem is not None, tp
        else:
            assert problem is None, tp


def with_mtp(folder: Path) -> Path:
    """Add the number of draft layers to a stand-in's config: LMDeploy takes it from there."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.get("text_config", config)["mtp_num_hidden_layers"] = 1
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("preset", "algorithm", "degrees"),
    [
        ("qwen3.5-27b", "qwen3_5_mtp", (1, 2, 4)),
        ("qwen3.5-35b-a3b", "qwen3_5_mtp", (1, 2, 4)),
        ("glm-4.5-air", "deepseek_mtp", (1, 2, 4, 8)),
        ("glm-4.5", "deepseek_mtp", (1, 2, 4, 8)),
        ("glm-4.7-flash", "deepseek_mtp", (1, 2, 4)),
        ("deepseek-v3", "deepseek_mtp", (1, 2, 4, 8)),
    ],
)
def test_drafts_are_as_large_as_lmdeploys_own_classes(rank, tmp_path, preset, algorithm, degrees):
    """The layers that propose tokens, of full width; experts are few."""
    model = preset_model(preset)
    layers = 4 if model.text.delta else 2  # one period of delta nets
    delta = model.text.delta and replace(model.text.delta, layers=3)
    moe = model.text.moe and replace(model.text.moe, layers=layers, experts=8)
    text = replace(model.text, layers=layers, delta=delta, moe=moe)
    model = with_draft(replace(model, text=text, quantization=None), algorithm, None, 1)
    folder = with_mtp(write_model(twin_of(model), tmp_path / "m"))
    for tp in degrees:
        own = rank(folder, tp, is_draft_model=True, spec_method=algorithm)
        # DeepSeek's class keeps a correction of each of the 8 experts at 32 bits, not at 16.
        wider = 16 if model.text.mla else 0
        assert own_draft_weights(model, model.draft, tp) + wider == own


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
@pytest.mark.parametrize("preset", ["qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3.5-9b"])
def test_states_are_those_of_lmdeploys_config(rank, tmp_path, monkeypatch, preset, tokens):
    from lmdeploy.hf_configs import config_from_pretrained
    from lmdeploy.pytorch import envs
    from lmdeploy.pytorch.configurations.builder import AutoModelConfigBuilder
    from lmdeploy.pytorch.engine.cache_engine.state import StateCacheEngine

    monkeypatch.setattr(envs, "fp32_mamba_ssm_dtype", False)
    model, settings = preset_model(preset), Settings(max_batch_size=30)
    folder = with_mtp(write_model(twin_of(model), tmp_path / "m"))
    for tp in (1, 2, 4):
        config = config_from_pretrained(str(folder), trust_remote_code=False)
        built = AutoModelConfigBuilder.build(
            config, str(folder), tp=tp, spec_method="qwen3_5_mtp", num_spec_tokens=tokens
        )
        slot = StateCacheEngine.get_state_slot_nbytes(built.states_shapes)
        assert state_bytes(model.text, replace(settings, tp=tp), tokens) == 32 * slot


@pytest.mark.parametrize(
    ("preset", "algorithm"),
    [
        ("qwen3.5-27b", "qwen3_5_mtp"),
        ("glm-4.5-air", "deepseek_mtp"),
        ("glm-4.7-flash", "deepseek_mtp"),
    ],
)
def test_blocks_of_a_draft_are_those_of_lmdeploys_plan(rank, tmp_path, preset, algorithm):
    import torch
    from lmdeploy.hf_configs import config_from_pretrained
    from lmdeploy.pytorch.config import CacheConfig
    from lmdeploy.pytorch.configurations.builder import AutoModelConfigBuilder
    from lmdeploy.pytorch.engine.cache_engine.plan import build_block_cache_plan

    model = with_draft(preset_model(preset), algorithm, None, 1)
    folder = with_mtp(write_model(twin_of(model), tmp_path / "m"))
    for tp in (1, 2, 4):
        config = config_from_pretrained(str(folder), trust_remote_code=False)
        built = AutoModelConfigBuilder.build(
            config, str(folder), tp=tp, is_draft_model=True, spec_method=algorithm
        )
        built.dtype = torch.bfloat16
        cache = CacheConfig(max_batches=8, block_size=64, num_cpu_blocks=0, num_gpu_blocks=0)
        plan = build_block_cache_plan(built, cache, tp)
        settings = Settings(tp=tp, speculative_algorithm=algorithm)
        assert draft_block(model, settings) == plan.logical_block_nbytes
