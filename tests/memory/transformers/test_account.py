"""The account beside what torch reserved for the real model code: figures of docs/fallback.md.

Rehearsed on pretend GPUs with torch 2.12.1 for CUDA and Transformers 5.17, bfloat16, sdpa, with
expandable segments; MiB, without the CUDA context.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Model, ModelSource, MoeDims, TextDims
from turbofit.core.plan import Settings, Workload
from turbofit.machine.source import machine_from
from turbofit.memory.account import EngineLaunch, VisionLoad
from turbofit.memory.engines import check_options, engine_for, engine_named
from turbofit.memory.transformers.account import TransformersAccount
from turbofit.model.parameters import text_parameters
from turbofit.model.presets import preset_model
from turbofit.planning.choose import best_plan
from turbofit.planning.resolved_request import ResolvedRequest, launch_of, vision_load_of

MIB = 1 << 20


def text_model(**dims):
    """A language model alone; towers that turbofit does not read yet are left out."""
    text = TextDims(architecture="x", max_position_embeddings=32768, head_dim=128, **dims)
    return Model(
        name="x", architecture="LlamaForCausalLM", parameters=1,
        weight_bytes=2 * text_parameters(text), dtype="bfloat16", text=text,
        source=ModelSource(kind="preset", where="x", sizes="formula"),
    )  # fmt: skip


MODEL = preset_model("qwen2-vl-7b")
LLAVA = text_model(layers=32, hidden=4096, heads=32, kv_heads=32, intermediate=11008, vocab=32064)
ONEVISION = text_model(
    layers=28, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocab=152064, qkv_bias=True
)
MISTRAL = text_model(layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocab=32064)
QWEN3_MOE = text_model(
    layers=4, hidden=2048, heads=32, kv_heads=4, intermediate=6144, vocab=151936, qk_norm=True,
    moe=MoeDims(experts=128, experts_per_token=8, intermediate=768, layers=4),
)  # fmt: skip


def account(model, load=(64, 0, 0), placement=(), machine="1xa100-80g", dtype="bfloat16"):
    """``load``: tokens, images and vision units of a request."""
    machine, (tokens, images, units) = machine_from(machine), load
    launch = EngineLaunch(
        model=model, settings=Settings(dtype=dtype, session_len=tokens), gpus=machine.gpus,
        machine=machine, margins=(0,) * len(machine.gpus), placement=placement,
        vision_load=VisionLoad(
            units_per_image=units, images_per_request=images, tokens_per_request=0
        ),
    )  # fmt: skip
    return TransformersAccount(launch)


def forecast(model, load, place=0, placement=(), gpus=1):
    """What the process's torch may hold on a card, without what its weights leave out."""
    made = account(model, load, placement, f"{gpus}xa100-80g")
    ledger = made.ledgers_at(0.5)[place]
    assert ledger == made.ledgers_at(0.9)[place]
    return (ledger.peak - sum(t.bytes for t in ledger.terms if t.phase in ("before", "context")),
            sum(t.bytes for t in ledger.terms if t.phase == "weights"))  # fmt: skip


# Prompt and answer, images, vision units; weights and reserved at the peak.
@pytest.mark.parametrize(
    ("model", "tokens", "images", "units", "weights", "reserved"),
    [
        ("qwen2-vl-2b", 2726, 1, 10752, 4213.3, 4810),
        ("qwen2-vl-2b", 16422, 1, 65536, 4213.3, 7672),
        ("qwen2-vl-2b", 8196, 0, 0, 4213.3, 5030),
        ("qwen2-vl-2b", 32704, 0, 0, 4213.3, 7332),
        ("qwen2-vl-7b", 2726, 1, 10752, 15814.5, 16466),
        ("qwen2-vl-7b", 8196, 0, 0, 15814.5, 17488),
        ("qwen2-vl-7b", 32698, 1, 65536, 15814.5, 22870),
        ("qwen2.5-vl-7b", 32698, 1, 65536, 15816.1, 23026),
        ("qwen2.5-omni-7b", 16388, 1, 65536, 17043.4, 20966),
        ("qwen2.5-omni-7b", 25600, 1, 65536, 17043.4, 22888),
        ("qwen2.5-omni-3b", 32768, 1, 65536, 8978.5, 13420),
        ("internvl3-8b-hf", 32768, 1, 13, 15152.7, 21888),
        (LLAVA, 4004, 0, 0, 13472.4, 15926),
        (ONEVISION, 16388, 0, 0, 15345.8, 18728),
        (MISTRAL, 16388, 0, 0, 14432.4, 18544),
        (QWEN3_MOE, 8004, 0, 0, 5941.0, 7488),
    ],
)
def test_never_under(model, tokens, images, units, weights, reserved):
    model = preset_model(model) if isinstance(model, str) else model
    peak, held = forecast(model, (tokens, images, units))
    beside, seen = (peak - held) / MIB, reserved - weights
    # What weights round up to is among the reserved bytes, so that it is charged here too.
    rounding = 64 + (576 if model.text.moe else 0)
    assert seen <= beside + rounding <= 1.45 * seen + rounding


def windowed(architecture="MistralForCausalLM", window=4096, **dims):
    """Two layers, and the bytes that torch had allocated beside their weights."""
    dims = {"layers": 2, "vocab": 32000, "kv_heads": 2, "hidden": 1024, "heads": 8, **dims}
    text = text_model(**dims)
    more = {"sliding_window": window} if window else {}
    return replace(text, text=replace(text.text, architecture=architecture, **more))


SMALL = windowed(intermediate=3584)
LARGE = windowed(hidden=4096, heads=32, kv_heads=8, intermediate=14336)
QWEN2_MOE = windowed(
    "Qwen2MoeForCausalLM", 0, intermediate=512, qkv_bias=True,
    moe=MoeDims(
        experts=4, experts_per_token=2, intermediate=64, layers=2, shared_intermediate=64
    ),
)  # fmt: skip


# With torch 2.13 and Transformers 5.17: allocated at the peak beside the weights, MiB; a length
# that is no multiple of 16 costs a copy of the mask more.
@pytest.mark.parametrize(
    ("model", "tokens", "allocated"),
    [
        (SMALL, 4094, 126.0), (SMALL, 4096, 142.1), (SMALL, 8192, 324.3), (SMALL, 8197, 436.8),
        (SMALL, 16384, 1032.5), (SMALL, 16391, 1513.7), (SMALL, 24576, 2124.7),
        (LARGE, 8192, 1060.3), (LARGE, 16391, 2249.5), (LARGE, 24576, 3564.7),
        (QWEN2_MOE, 8197, 301.4), (QWEN2_MOE, 16391, 801.4),
    ],
)  # fmt: skip
def test_the_mask_of_a_sliding_window_is_charged(model, tokens, allocated):
    peak, weights = forecast(model, (tokens, 0, 0))
    beside = (peak - weights) / MIB
    assert allocated <= beside
    if tokens % 16:
        assert beside <= 1.35 * allocated


# An offloaded layer is charged where it runs.
@pytest.mark.parametrize(
    ("layers", "gpus", "load", "reserved"),
    [
        ((*[0] * 12, *[1] * 16), 2, (16384, 1, 32768), (10730, 11002)),
        ((*[0] * 8, *[None] * 13, *[0] * 7), 1, (2304, 1, 5120), (10564,)),
    ],
)
def test_layers_on_two_cards_and_in_host_memory(layers, gpus, load, reserved):
    for place, seen in enumerate(reserved):
        peak, _ = forecast(MODEL, load, place, layers, gpus=gpus)
        assert seen <= peak / MIB <= (1.06 if gpus == 2 else 1.07) * seen


def test_options_of_the_others_are_refused():
    engine = engine_named("transformers")
    check_options(engine, {"dtype": "float16", "session_len": 4096, "max_batch_size": 1})
    for name in ("communicator", "eager_mode", "quant_policy"):
        with pytest.raises(UsageError, match="the fallback engine has no such option"):
            check_options(engine, {name: 1})


@pytest.mark.parametrize("on", ["1xrtx3090", "2xrtx3060", "1xrtx3060"])
def test_its_account_of_a_launch_is_the_plan_s(on):
    request = ResolvedRequest(model=MODEL, machine=machine_from(on), workload=Workload(images=2))
    plan = best_plan(request, "transformers")
    assert plan.fits
    engine, vision_load = (
        engine_for(MODEL, "transformers"),
        vision_load_of(request, plan.promise.limits.image_limit),
    )
    gpus = [request.machine.gpu(index) for index in plan.groups[0]]
    account = engine.account(launch_of(request, plan.engines[0].settings, gpus, vision_load))
    ratio = plan.engines[0].settings.cache_max_entry_count
    assert account.ledgers_at(ratio) == plan.ledgers
    assert (account.tokens_at(ratio), account.region_at(ratio)) == (
        plan.engines[0].kv.tokens,
        plan.engines[0].kv.region_bytes,
    )
    assert account.missing_at(0.5) == 0
    assert account.block_bytes == engine.cache(MODEL, plan.engines[0].settings).block_bytes
    assert engine.units_bound(MODEL.image_rule, vision_load, plan.engines[0].settings) == (
        plan.engines[0].units_per_forward
    )


# Beside the real model code on pretend GPUs: never under, and not far over.
