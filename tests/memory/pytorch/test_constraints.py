"""What the PyTorch engine refuses, before it is started."""

from __future__ import annotations

from typing import Literal

import pytest
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import launch_on
from tests.memory.pytorch.test_account import problem, tp_problem
from turbofit.core.errors import NoKernelError, TurbofitError, UsageError
from turbofit.core.model import Quantization
from turbofit.core.plan import Settings
from turbofit.memory.pytorch.account import capture_sizes
from turbofit.memory.pytorch.cache import engine_bound, units_met
from turbofit.memory.pytorch.weights import environment
from turbofit.model.source import resolve_model


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
    ("name", "method", "degrees"),
    [
        ("qwen3-8b", "fp8", (1, 2, 4, 8)),
        ("qwen3-4b", "fp8", (1, 2, 4)),  # 76 blocks of 128 in an MLP
        ("qwen2.5-0.5b", "fp8", (1,)),  # two KV heads of 64
        ("glm-4.5-air", "fp8", ()),  # 10,944 channels are 85 blocks and a half
        ("qwen3-30b-a3b", "fp8", (1, 2, 4, 8)),  # experts of six blocks, unequally
        ("deepseek-v3", "fp8", (1, 2, 4, 8)),
        ("qwen2.5-3b", "awq", (1, 2)),
        ("qwen2.5-14b", "awq", (1, 2, 4)),
        ("qwen2.5-3b", None, (1, 2, 4, 8)),
    ],
)
def test_packed_layers_are_dealt_in_whole_groups(
    name: str, method: Literal["awq", "fp8"] | None, degrees: tuple[int, ...]
) -> None:
    """Beside what LMDeploy's loaders take, in ``test_oracle_ranks.py``."""
    packed = Quantization(method=method, bits=4, group_size=128) if method else None
    model = replace(resolve_model(name), quantization=packed)
    assert degrees == tuple(tp for tp in (1, 2, 4, 8) if tp_problem(model, tp) is None)


def test_states_in_bfloat16_alone() -> None:
    with pytest.raises(UsageError, match="in no other dtype: --dtype is float16"):
        turbofit.plan("qwen3-next-80b-a3b", on="2xh200", dtype="float16")
    assert turbofit.plan("qwen3.5-4b", on="1xl4", dtype="float16", engine="pytorch").fits
    with pytest.raises(NoKernelError, match="in bfloat16, which Tesla V100") as caught:
        turbofit.plan("qwen3-next-80b-a3b", on="8xv100-32g")
    assert "--dtype" not in caught.value.message + caught.value.hint
    assert turbofit.plan("qwen3.5-4b", on="1xt4", engine="pytorch").fits
    name, settings = "LMDEPLOY_FP32_MAMBA_SSM_DTYPE", Settings()
    assert environment(settings, resolve_model("qwen3.5-9b"))[name] == "0"
    assert name not in environment(settings, resolve_model("qwen3-vl-8b"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_max_entry_count": 1.5}, "between 0 and 1"), ({"quant_policy": 5}, "quant-policy"),
        ({"quant_policy": 16}, None), ({"quant_policy": 42}, None),
        ({"distributed_executor_backend": "uni"}, None),
        ({"distributed_executor_backend": "uni", "tp": 2}, "uni runs one rank"),
        ({"num_gpu_blocks": 2}, "keeps so many"), ({"num_gpu_blocks": 3}, None),
        ({"cache_block_seq_len": 48}, "powers of two from 16 on"),
        ({"cache_block_seq_len": 8}, "powers of two from 16 on"),
        ({"model_format": "awq"}, "takes no such word"),
        ({"model_format": "hf"}, "takes no such word"),
        ({"model_format": "fp8"}, "no account of weights that are quantised"),
        ({"communicator": "cuda-ipc"}, "is TurboMind's"),
    ],
)  # fmt: skip
def test_options(options: dict[str, object], words: str | None) -> None:
    said = problem("internvl2-8b", **options)
    assert said is None if words is None else words in str(said)
    assert "are awq" in str(problem("internvl2-8b-awq", model_format="hf"))


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


@pytest.mark.parametrize(
    ("batch", "own", "sizes"),
    [
        (6, None, [1, 2, 4, 6]),
        (1024, None, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024]),
        (8, (2,), [2, 8]),
    ],
)
def test_graphs_are_captured_for_the_sizes_of_the_engine(
    batch: int, own: tuple[int, ...] | None, sizes: list[int]
) -> None:
    settings = Settings(max_batch_size=batch, cudagraph_capture_batch_sizes=own)
    assert capture_sizes(settings) == sizes
    assert capture_sizes(Settings(max_batch_size=batch, eager_mode=True)) == []


def test_the_engine_s_own_capture_sizes() -> None:
    """The rule of LMDeploy's graph runner, read from its source where torch is no CUDA build."""
    lmdeploy = pytest.importorskip("lmdeploy")
    import ast
    from pathlib import Path

    path = Path(lmdeploy.__file__).parent / "pytorch/backends/cuda/graph_runner/runner.py"
    wanted = "_get_capture_batch_size_impl"
    (found,) = [
        node for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == wanted
    ]  # fmt: skip
    found.decorator_list = []
    scope: dict = {}
    exec(compile(ast.Module([found], []), str(path), "exec"), scope)
    for batch in (1, 2, 3, 7, 8, 100, 128, 255, 256, 257, 300, 512, 600, 1024):
        assert scope[wanted](batch) == capture_sizes(Settings(max_batch_size=batch))


def test_images_meet_by_their_tokens_and_the_next_forward_s_are_on_the_card_already() -> None:
    """Images are never cut, and pixels of the next forward are sent while one runs."""
    launch = launch_on("1xrtx3090", "internvl2-8b", units=None)
    rule, load = launch.model.image_rule, launch.vision_load
    many = Settings(max_batch_size=8, max_prefill_token_num=8192)
    few = Settings(max_batch_size=8, max_prefill_token_num=1024)
    one = Settings(max_batch_size=1, max_prefill_token_num=8192)
    assert engine_bound(rule, load, many) == 32  # 8192 tokens of 256 each
    assert engine_bound(rule, load, few) == 13  # a chunk grows for an image
    assert engine_bound(rule, load, one) == 13
    assert units_met(rule, load, many) == (32, 32)
    # After an image that is a chunk of its own come the small images of other requests ...
    assert units_met(rule, load, few) == (13, 4)
    # ... or the next image of its own.
    several = launch_on("1xrtx3090", "internvl2-8b", units=None, images=3).vision_load
    assert units_met(rule, several, few) == (13, 13)
    # One row at a time; and a gateway that lets no more through than one forward has.
    assert units_met(rule, load, one) == (13, 0)
    assert units_met(rule, replace(load, units_per_forward=26), many) == (26, 0)


@pytest.mark.parametrize(
    ("name", "tp", "dims", "said"),
    [
        # Heads of its attention that would divide.
        ("qwen3.5-27b", 3, {"heads": 24, "kv_heads": 3, "intermediate": 3072}, "16 key heads"),
        # Llama 4 repeats no heads, and deals experts evenly.
        ("llama-4-scout", 16, {"heads": 48}, "8 KV heads"),
        ("llama-4-scout", 4, {"moe": 8190}, "the experts' 8190"),
    ],
)
def test_what_is_not_dealt_evenly(name: str, tp: int, dims: dict[str, int], said: str) -> None:
    text = resolve_model(name).text
    if "moe" in dims:
        text = replace(text, moe=replace(text.moe, intermediate=dims["moe"]))
    else:
        text = replace(text, **dims)
    assert said in str(tp_problem(replace(resolve_model(name), text=text), tp))
