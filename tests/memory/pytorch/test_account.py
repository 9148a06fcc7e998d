"""The PyTorch engine's account against what that engine did on pretend GPUs.

The figures were seen with LMDeploy 0.18, torch 2.12.1 and expandable segments at tp 1, Ray's fixed
segments at tp 2 (bench/rehearsal/PYTORCH.md is of the same): MiB by torch's own allocator.
"""

from __future__ import annotations

import ast
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import card, launch_on, machine_of
from turbofit import api
from turbofit.core.errors import NoKernelError, TurbofitError, UsageError
from turbofit.core.machine import Machine
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Plan, Settings
from turbofit.core.units import MIB
from turbofit.memory.account import VisionLoad
from turbofit.memory.pytorch import weights as pytorch_weights
from turbofit.memory.pytorch.account import Pytorch, PytorchAccount, capture_sizes
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.cache import engine_bound, units_met
from turbofit.memory.pytorch.weights import (
    environment,
    load_constants,
    segments,
    share_of,
    weight_classes,
)
from turbofit.memory.turbomind.weights import load_constants as load_turbomind
from turbofit.memory.turbomind.weights import weight_classes as turbomind_classes
from turbofit.model.source import resolve_model
from turbofit.planning.commands import commands, private_commands

CONSTANTS = load_constants()
ENGINE = Pytorch("0.18")


class Seen(NamedTuple):
    """One rehearsal: tensors of the weights, then what was live above what stayed afterwards.

    ``prompt`` are tokens of the image case, where they were fewer than a prefill's.
    """

    model: str
    tp: int
    weights: float
    text: float
    vision: float = 0.0
    units: int = 0
    prefill: int = 8192
    context: int = 32768
    prompt: int | None = None


SEEN = [
    Seen("qwen2.5-7b", 1, 14525.6, 932.5),
    Seen("llama-3.1-8b", 1, 15316.5, 836.5, context=41024),
    Seen("qwen2-vl-7b", 1, 15814.5, 932.9, 2827.9, 65536),
    Seen("qwen2-vl-7b", 1, 15814.5, 233.5, 353.8, 8192, prefill=2048),
    Seen("internvl3-8b-hf", 1, 15152.7, 932.5, 904.8, 26),
    Seen("internvl3-8b", 1, 15152.7, 932.5, 437.4, 13, prompt=3382),
    Seen("qwen2.5-vl-7b", 1, 15816.1, 932.9, 2721.9, 65536, context=30336),
    Seen("qwen2-vl-2b", 1, 4213.3, 429.0, 2764.0, 65536),
    Seen("qwen2-vl-2b", 2, 2363.5, 288.7, 2124.9, 65536),
    Seen("qwen2-vl-7b", 2, 8991.1, 636.7, 2188.9, 65536),
    Seen("internvl3-8b-hf", 2, 8615.2, 636.5, 630.7, 26),
]


@pytest.mark.parametrize("seen", SEEN, ids=lambda seen: f"{seen.model}-tp{seen.tp}-{seen.units}")
def test_weights_and_forwards_are_the_engine_s_and_never_under(seen: Seen) -> None:
    model = resolve_model(seen.model)
    held = sum(weight_classes(model, seen.tp).values()) / MIB
    # Over where the projector is sharded too, as in the hf format of InternVL.
    assert seen.weights - 2 <= held <= seen.weights * 1.0035
    settings = Settings(tp=seen.tp, max_prefill_token_num=seen.prefill, max_batch_size=8)
    work = Activations(model, settings, CONSTANTS)
    size = work.prefill(Prefill(tokens=seen.prefill, context=seen.context)) / MIB
    assert seen.text <= size <= seen.text * 1.03 + 4
    if seen.units:
        tokens = seen.prompt or max(seen.prefill, model.image_rule.unit_tokens(seen.units))
        forward = Prefill(tokens=tokens, context=seen.context, units=seen.units)
        # Within 2 % of a 24 GB card.
        assert seen.vision <= work.prefill(forward) / MIB <= seen.vision + 0.02 * 24576 + 1


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


def terms(model: Model, capability: tuple[int, int] | str, **changes: object) -> dict[str, int]:
    gpu = replace(card(total=80000), compute_capability=capability)
    machine = replace(machine_of(1), gpus=(gpu,))
    ledger = account(model, machine, session_len=4096, **changes).ledgers_at(0.5)[0].terms
    return {term.term: term.bytes for term in ledger}


def test_awq_is_held_twice_on_hopper_alone():
    model = resolve_model("qwen2.5-7b-awq")
    classes = weight_classes(model, 1)
    packed = classes["attention"] + classes["mlp"]
    hopper = terms(model, (9, 0))
    assert packed < hopper["weights.packed_copy"] < 1.12 * packed
    assert "packed_kernels" in hopper
    assert terms(model, "NA")["weights.packed_copy"] == hopper["weights.packed_copy"]
    for other in ((8, 6), (10, 0)):
        assert "weights.packed_copy" not in terms(model, other)
        assert "packed_kernels" not in terms(model, other)
    assert "weights.packed_copy" not in terms(resolve_model("qwen2.5-7b"), (9, 0))


def test_layers_left_unpacked_are_counted_from_the_files():
    """Files that hold 600 MiB more than packed layers would: the rest stays at 16 bits."""
    model = resolve_model("internvl2-8b-awq")
    exact = replace(model, source=replace(model.source, sizes="file"))
    more = replace(exact, weight_bytes=model.weight_bytes + 600 * MIB)
    for classes in (weight_classes, partial(turbomind_classes, constants=load_turbomind())):
        assert classes(more, 4)["unpacked"] == 600 * MIB // 4
        assert "unpacked" not in classes(exact, 4)


@pytest.mark.parametrize(
    ("tp", "backend", "kind"),
    [
        (1, None, "expandable"), (1, "mp", "expandable"), (1, "ray", "fixed"),
        (2, None, "fixed"), (2, "mp", "expandable"), (2, "ray", "fixed"),
    ],
)  # fmt: skip
def test_rays_workers_refuse_expandable_segments_whatever_their_number(tp, backend, kind):
    settings = Settings(tp=tp, distributed_executor_backend=backend)
    assert segments(settings) == kind
    names = environment(settings, resolve_model("qwen2-vl-7b"))
    assert ("PYTORCH_CUDA_ALLOC_CONF" in names) is (kind == "expandable")


@pytest.mark.parametrize(("on", "known"), [("1xh100", True), ("1xrtx4090", True), ("1xl4", False)])
def test_torch_is_held_to_its_plan_and_half_the_margin(monkeypatch, on, known):
    """On a real H100 torch took all but 111 MiB of the card, on pretend ones all but 12."""
    monkeypatch.setattr(pytorch_weights, "torch_takes_a_share", lambda: known)
    plan = turbofit.plan("qwen2.5-vl-7b", on=on, engine="pytorch")
    (launched,) = private_commands(plan, [5000], "/models/x", "name")
    words = launched.env["PYTORCH_CUDA_ALLOC_CONF"]
    # A torch that does not know the option would end, and so may one that a person starts.
    assert [one.env["PYTORCH_CUDA_ALLOC_CONF"] for one in commands(plan)] == [
        "expandable_segments:True"
    ]
    # An option that no plan counts takes of the margin.
    (more,) = private_commands(plan, [5000], "/models/x", "name", ["--hf-overrides"], held=False)
    assert more.env["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    if not known:
        assert words == "expandable_segments:True"
        return
    segments, _, limit = words.partition(",per_process_memory_fraction:")
    assert segments == "expandable_segments:True"
    (ledger,) = plan.ledgers
    usable = ledger.total - ledger.reserved
    outside = ("cuda_context", "kernel_modules")
    most = float(limit) * usable + sum(t.bytes for t in ledger.terms if t.term in outside)
    assert most == pytest.approx(ledger.peak + ledger.margin / 2, abs=usable * 0.0001)
    assert usable - most > 120 * MIB


def test_what_a_budget_withholds_is_no_room_for_torch():
    """Another model's half of the card is in the margin: torch took 18 GiB of it."""
    plan = turbofit.plan("qwen2.5-vl-7b", on="1xh100", engine="pytorch", budget="40GiB")
    (ledger,) = plan.ledgers
    outside = ("cuda_context", "kernel_modules")
    beside = sum(term.bytes for term in ledger.terms if term.term in outside)
    most = share_of([ledger]) * (ledger.total - ledger.reserved) + beside
    assert most == pytest.approx(ledger.peak + (ledger.margin - ledger.withheld) / 2)
    assert ledger.peak < most < ledger.budget


@pytest.mark.parametrize(
    ("crops", "images", "chunk", "meet"),
    [
        # Phi-3.5's smallest page is 313 tokens, and as many tiles as any.
        (1, 1, 8192, 8192 // 313 * 2), (16, 1, 8192, 8192 // 313 * 17),
        # A page of 16 tiles is 2509 tokens, and every chunk of its prompt as long: 8 small ones.
        (16, 1, 1024, 1024 // 313 * 17), (16, 5, 1024, 5 * 17), (16, 20, 1024, 2509 // 313 * 17),
    ],
)  # fmt: skip
def test_pages_that_meet_are_padded_to_the_planned_limit(crops, images, chunk, meet):
    rule = resolve_model("phi-3.5-vision").image_rule
    load = VisionLoad(
        units_per_image=crops + 1, images_per_request=images, tokens_per_request=2509 * images
    )
    batch = 128 if chunk == 8192 else 4
    settings = Settings(max_batch_size=batch, session_len=8192, max_prefill_token_num=chunk)
    assert engine_bound(rule, load, settings) == meet


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
        ("internvl2-8b", {"num_gpu_blocks": 2}, "keeps so many"),
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

    def met(load: VisionLoad, settings: Settings) -> tuple[int, int]:
        return units_met(engine_bound(rule, load, settings), rule, load, settings)

    assert met(load, many) == (32, 32)
    # After an image that is a chunk of its own come the small images of other requests ...
    assert met(load, few) == (13, 4)
    # ... or the next image of its own.
    several = launch_on("1xrtx3090", "internvl2-8b", units=None, images=3).vision_load
    assert met(several, few) == (13, 13)
    # One row at a time; and a gateway that lets no more through than one forward has.
    assert (met(load, one), met(replace(load, units_per_forward=26), many)) == ((13, 0), (26, 0))
