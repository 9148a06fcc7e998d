"""The account of Transformers: options, launches, and the account of a plan."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.model import Model, ModelSource, TextDims
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


def test_options_of_the_others_are_refused():
    engine = engine_named("transformers")
    check_options(engine, {"dtype": "float16", "session_len": 4096, "max_batch_size": 1})
    for name in ("communicator", "eager_mode", "quant_policy"):
        with pytest.raises(UsageError, match="not of the fallback engine"):
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
