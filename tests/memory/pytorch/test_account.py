"""The PyTorch engine's account against what that engine did on pretend GPUs.

The figures were seen with LMDeploy 0.18, torch 2.12.1 and expandable segments at tp 1, Ray's fixed
segments at tp 2 (bench/rehearsal/PYTORCH.md is of the same): MiB by torch's own allocator.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import launch_on
from tests.memory.pytorch.test_cache import STATE, WINDOW
from turbofit import api
from turbofit.core.errors import NoKernelError, TurbofitError, UsageError
from turbofit.core.machine import Machine
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Plan, Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.account import Pytorch, PytorchAccount, capture_sizes
from turbofit.memory.pytorch.weights import (
    environment,
    load_constants,
)
from turbofit.memory.start_outcome import outcome_at
from turbofit.model.source import resolve_model

CONSTANTS = load_constants()
ENGINE = Pytorch("0.18")


def account(
    name: str | Model = "qwen2-vl-7b",
    on: str | Machine = "1xrtx3090",
    free: int | None = None,
    **settings: Any,
) -> PytorchAccount:
    options = {"max_batch_size": 8, **settings}
    launch = launch_on(on, name, units=None, margin=256, free=free, **options)
    return PytorchAccount(launch, CONSTANTS)


def tp_problem(model: Model, tp: int) -> str | None:
    return ENGINE.tp_problem(model, tp)


@pytest.mark.parametrize(
    ("name", "free", "ratio", "blocks"),
    [
        # `num_gpu_blocks` as the engine logged it, at its own defaults.
        ("qwen2-vl-7b", 7930, 0.8, 1252),
        ("qwen2-vl-7b", 7930, 0.99, 1549),
        ("qwen2-vl-2b", 19492, 0.8, 7791),
        ("internvl3-8b-hf", 8672, 0.8, 1423),
        ("qwen2.5-0.5b", 22964, 0.8, 21883),
        ("llava-1.5-7b", 10458, 0.8, 248),
    ],
)
def test_blocks_are_the_engine_s_own(name: str, free: int, ratio: float, blocks: int) -> None:
    one = account(name, free=free * MIB, max_batch_size=128)
    assert one.region_at(ratio) == blocks * one.block_bytes
    assert one.tokens_at(ratio) == (blocks - 2) * 64


def test_a_block_count_is_taken_as_it_is() -> None:
    one = account(num_gpu_blocks=500)
    assert one.region_at(0.1) == one.region_at(0.9) == 500 * one.block_bytes
    many = account(num_gpu_blocks=5000)
    assert not many.fits_at(0.5)
    looks: list[float] = []
    many.fits_at = lambda ratio: bool(looks.append(ratio))  # type: ignore[method-assign]
    assert many.best_ratio() is None
    assert len(looks) == 1
    # LMDeploy holds the ratio's blocks to 16, not ``num_gpu_blocks``.
    few = account("qwen2.5-0.5b", num_gpu_blocks=10)
    assert few.tokens_at(0.8) == 8 * 64
    assert not few.cache_shortfall_at(0.8)
    assert few.cache_shortfall_at(1e-9)


def test_quantised_caches_hold_scales_and_zeros() -> None:
    rows = 64 * 4 * 28 * 2  # tokens, KV heads, layers, keys and values
    sizes = {
        0: rows * 128 * 2, 8: rows * (128 + 4), 4: rows * (64 + 4), 16: rows * 128,
        # Keys of 4 bits with two numbers, values of 2 bits with one.
        42: rows // 2 * (64 + 4 + 32 + 2),
    }  # fmt: skip
    assert {policy: account(quant_policy=policy).block_bytes for policy in sizes} == sizes
    # TurboQuant rotates queries and outputs.
    plain, four, turbo = (
        next(term.bytes for term in one.transients if term.term == "text_prefill")
        for one in (account("llama-2-7b", quant_policy=policy) for policy in (0, 4, 42))
    )
    assert turbo > four == plain


def _terms(plan: Plan) -> dict[str, int]:
    return {term.term: term.bytes for term in plan.ledgers[0].terms}


def test_a_prefill_has_no_room_in_the_graphs_pool() -> None:
    eager, graphs = (
        api.plan("qwen2.5-7b", on="1xrtx3090", engine="pytorch", eager_mode=mode)
        for mode in (True, False)
    )
    assert "cuda_graphs" not in _terms(eager)
    assert _terms(graphs)["cuda_graphs"] >= CONSTANTS.segment
    assert _terms(graphs)["pool_warmup"] == _terms(eager)["pool_warmup"] >= CONSTANTS.segment
    assert graphs.engines[0].kv.tokens < eager.engines[0].kv.tokens
    # The longest prompt: 116.8 MiB live on pretend GPUs, and a page in part.
    assert _terms(graphs)["text_prefill"] >= 116.8 * MIB + CONSTANTS.segment


def test_what_qwen3_vl_holds_besides() -> None:
    """2B, chunks of 4096 and a long context: 378.4 MiB live, with normed queries and keys.

    8B, 65,536 patches: 2,638.9 MiB live, 384 of them that the tower gives the first layers.
    """
    plan = api.plan(
        "qwen3-vl-2b", on="1xrtx3060", engine="pytorch", image_size=(1344, 1568),
        max_prefill_token_num=4096, context=65_536,
    )  # fmt: skip
    assert _terms(plan)["text_prefill"] >= 378.4 * MIB
    plan = api.plan("qwen3-vl-8b", on="1xrtx3090", engine="pytorch")
    assert plan.engines[0].units_per_forward == 65536
    more = _terms(plan)["vision_forward"] - int(2638.9 * MIB)
    assert 0 <= more <= 0.02 * plan.ledgers[0].total


@pytest.mark.parametrize(
    ("rows", "sampled", "idle"),
    [(8, 47.2, 15.1), (50, 290.7, 11.9), (64, 371.8, 30.9), (127, 556.4, 30.9), (160, 0, 41.8)],
)
def test_so_many_rows_that_sample_are_never_under(rows: int, sampled: float, idle: float) -> None:
    """Qwen2.5-0.5B with top_k=0, live on pretend GPUs, and what the warm-up leaves.

    Torch sorts few rows with more: the forecast of 127 rows is that of 128.
    """
    plan = api.plan("qwen2.5-0.5b", on="1xrtx3060", engine="pytorch", max_batch_size=rows)
    assert _terms(plan)["sampling"] >= sampled * MIB
    assert _terms(plan)["pool_warmup"] >= idle * MIB


# What the engine refuses, before it is started.


@pytest.mark.parametrize(
    ("name", "tp", "words"),
    [
        ("qwen2-vl-7b", 4, None),
        ("qwen2-vl-7b", 3, "attention heads"),
        ("cogvlm-17b", 2, None),
        ("qwen2-vl-2b", 4, None),  # two KV heads, each on two ranks
        ("llama-4-scout", 8, None),
        ("llama-4-scout", 16, "attention heads"),
        ("qwen3.5-35b-a3b", 16, None),
        ("kimi-k2.5", 16, None),
        ("kimi-k2.5", 128, "heads"),
        ("minicpm3-4b", 1, None),
        ("minicpm3-4b", 2, "on several ranks"),
        ("glm-4.7-flash", 4, None),
        ("glm-4.7-flash", 8, "20 attention heads"),
    ],
)
def test_tensor_parallel_degrees(name: str, tp: int, words: str | None) -> None:
    said = tp_problem(resolve_model(name), tp)
    assert said is None if words is None else words in str(said)


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("glm-4.5-air", ()),  # 10,944 channels are 85 blocks and a half
        ("qwen3-30b-a3b", (1, 2, 4, 8)),  # experts of six blocks, unequally
        ("deepseek-v3", (1, 2, 4, 8)),
    ],
)
def test_packed_layers_are_dealt_in_whole_groups(name: str, degrees: tuple[int, ...]) -> None:
    """Beside what LMDeploy's loaders take, in ``test_oracle_ranks.py``."""
    packed = Quantization(method="fp8", bits=8, group_size=128)
    model = replace(resolve_model(name), quantization=packed)
    assert degrees == tuple(tp for tp in (1, 2, 4, 8) if tp_problem(model, tp) is None)


def test_states_in_bfloat16_alone() -> None:
    with pytest.raises(UsageError, match="in no other dtype: dtype is float16"):
        turbofit.plan("qwen3-next-80b-a3b", on="2xh200", dtype="float16")
    assert turbofit.plan("qwen3.5-4b", on="1xl4", dtype="float16", engine="pytorch").fits
    with pytest.raises(NoKernelError, match="in bfloat16, which Tesla V100") as caught:
        turbofit.plan("qwen3-next-80b-a3b", on="8xv100-32g")
    assert "dtype" not in caught.value.message + caught.value.hint
    assert turbofit.plan("qwen3.5-4b", on="1xt4", engine="pytorch").fits
    name, settings = "LMDEPLOY_FP32_MAMBA_SSM_DTYPE", Settings()
    assert environment(settings, resolve_model("qwen3.5-9b"))[name] == "0"
    assert name not in environment(settings, resolve_model("qwen3-vl-8b"))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("internvl2-8b", {"cache_max_entry_count": 1.5}, "between 0 and 1"),
        ("internvl2-8b", {"quant_policy": 5}, "quant-policy"),
        ("internvl2-8b", {"quant_policy": 16}, None), ("internvl2-8b", {"quant_policy": 42}, None),
        ("internvl2-8b", {"distributed_executor_backend": "uni"}, None),
        ("internvl2-8b", {"distributed_executor_backend": "uni", "tp": 2}, "runs one rank, not 2"),
        ("internvl2-8b", {"num_gpu_blocks": 2}, "needs all these blocks"),
        ("internvl2-8b", {"num_gpu_blocks": 3}, None),
        ("internvl2-8b", {"cache_block_seq_len": 48}, "powers of two from 16 on"),
        ("internvl2-8b", {"cache_block_seq_len": 8}, "powers of two from 16 on"),
        ("internvl2-8b", {"model_format": "awq"}, "are stored in"),
        ("internvl2-8b", {"model_format": "hf"}, "are stored in"),
        ("internvl2-8b", {"model_format": "fp8"}, "no account of weights that are quantised"),
        ("internvl2-8b", {"communicator": "cuda-ipc"}, "is TurboMind's"),
        ("internvl2-8b-awq", {"model_format": "hf"}, "are stored in awq"),
        ("glm-4.7-flash", {}, None), ("glm-4.7-flash", {"quant_policy": 8}, "latent attention"),
        ("minicpm3-4b", {}, None), ("minicpm3-4b", {"quant_policy": 16}, None),
        ("minicpm3-4b", {"quant_policy": 4}, "--quant-policy 4"),
        ("minicpm3-4b", {"quant_policy": 42}, "--quant-policy 42"),
    ],
)  # fmt: skip
def test_options(model: str, options: dict[str, object], words: str | None) -> None:
    said = ENGINE.problem(launch_on("1xa100-80g", model, **options))
    assert said is None if words is None else words in str(said)


@pytest.mark.parametrize(
    ("model", "on", "policy", "words"),
    [
        ("qwen2.5-7b", "1xrtx3090", "fp8", "no fp8 KV cache"),
        ("qwen2.5-7b", "1xrtx4090", "fp8", None),
        ("qwen2.5-7b", "1xrtx3090", "fp8_e5m2", None),
        ("qwen2.5-3b", "1xt4", "turbo_quant", None),
        ("internvl2-4b", "1xrtx3090", "turbo_quant", "a power of two, not of 96"),
    ],
)
def test_types_of_the_cache(model: str, on: str, policy: str, words: str | None) -> None:
    options = {"on": on, "engine": "pytorch", "quant_policy": policy, "context": 4096}
    if words is None:
        assert turbofit.plan(model, **options).fits
    else:
        with pytest.raises(TurbofitError, match=words):
            turbofit.plan(model, **options)


@pytest.mark.skipif(find_spec("lmdeploy") is None, reason="needs LMDeploy's source")
def test_the_engine_s_own_capture_sizes() -> None:
    """The rule of LMDeploy's graph runner, read from its source where torch is no CUDA build."""
    src = Path(find_spec("lmdeploy").origin).parent / "pytorch/backends/cuda/graph_runner/runner.py"
    wanted = "_get_capture_batch_size_impl"
    (found,) = [
        node for node in ast.parse(src.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == wanted
    ]  # fmt: skip
    found.decorator_list = []
    scope: dict = {}
    exec(compile(ast.Module([found], []), str(src), "exec"), scope)
    for batch in (1, 2, 3, 7, 8, 100, 128, 255, 256, 257, 300, 512, 600, 1024):
        assert scope[wanted](batch) == capture_sizes(Settings(max_batch_size=batch))


def test_ranks_keep_whole_groups() -> None:
    model = resolve_model("kimi-k2.5")
    narrow = replace(model, text=replace(model.text, moe=replace(model.text.moe, intermediate=96)))
    assert "groups of 32" in str(tp_problem(narrow, 2))
    assert tp_problem(replace(narrow, quantization=None), 2) is None


def test_the_worst_image_of_qwen3_omni_is_never_under() -> None:
    """50,176 patches in one forward: 1,797.0 MiB live on pretend GPUs."""
    plan = api.plan("qwen3-omni-30b-a3b", on="1xa100-80g", engine="pytorch")
    terms = {term.term: term.bytes for term in plan.ledgers[0].terms}
    seen = int(1797.0 * MIB)
    assert plan.engines[0].units_per_forward == 50_176
    assert seen <= terms["vision_forward"] <= seen + 0.03 * plan.ledgers[0].total
    assert not plan.takes_videos


def ledger(one: PytorchAccount, ratio: float = 0.5) -> dict[str, int]:
    return {term.term: term.bytes for term in one.ledgers_at(ratio)[0].terms}


def test_states_come_off_what_is_free_before_the_ratio() -> None:
    free = 20_000 * MIB
    one = account("qwen3.5-27b", on="1xh100", free=free, max_batch_size=8)
    runtime = (8192 + 2 * 8) * 248_320 * 2
    assert one.ratio_base == free - 10 * (WINDOW + STATE) - runtime
    blocks = int(one.ratio_base * 0.8) // one.block_bytes
    assert one.region_at(0.8) == blocks * one.block_bytes
    found = ledger(one)
    assert 0 <= found["state_cache"] - 10 * (WINDOW + STATE) < CONSTANTS.page
    assert list(found).index("state_cache") == list(found).index("kv_cache") + 1
    assert "state_cache" not in ledger(account("qwen2-vl-7b"))
    most = account("qwen3.5-27b", on="1xh100", max_batch_size=512)
    assert most.best_ratio() is None
    fate = outcome_at(most, 0.8)
    assert (fate.kind, "state_cache 38.0 GiB" in fate.text) == ("buffers", True), fate.text
