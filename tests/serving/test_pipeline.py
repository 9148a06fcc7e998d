"""``turbofit.pipeline``: LMDeploy's real Pipeline over a stand-in engine, and a caller's config."""

from __future__ import annotations

import importlib
import inspect
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import turbofit
from tests.support.nvml import Scenario, gpu_3090, in_process
from tests.support.standin import standin_engine
from turbofit import api
from turbofit.core.errors import DoesNotFitError, LaunchError, NoGpuError, UsageError
from turbofit.core.units import GIB
from turbofit.machine import nvml_machine
from turbofit.machine.source import machine_from
from turbofit.planning.examine.cards import open_margin
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest
from turbofit.serving import gpu_monitor, planner
from turbofit.serving.leases import Leases, counted
from turbofit.serving.pipeline import (
    _OF_LMDEPLOY,
    config_engine,
    held_to,
    open_pipeline,
    planned_config,
    with_config,
)

pytestmark = pytest.mark.lmdeploy

lmdeploy: Any = None
#: It imports LMDeploy.
PLANNED = "turbofit.serving.planned_pipeline"


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """LMDeploy, which takes seconds: not in each worker that only collects this file."""
    globals()["lmdeploy"] = pytest.importorskip("lmdeploy")


@pytest.fixture(autouse=True)
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    import lmdeploy.turbomind
    import torch
    from lmdeploy.serve.core.async_engine import AsyncEngine
    from lmdeploy.vl import engine

    for target, name in (
        (AsyncEngine, "_build_turbomind"),
        (lmdeploy.turbomind, "is_available"),
        (engine, "is_bf16_supported"),
        (torch.cuda, "mem_get_info"),
    ):
        monkeypatch.setattr(target, name, getattr(target, name))
    monkeypatch.delenv("STANDIN_SCRIPT", raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TM_LOG_LEVEL"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    standin_engine.patch_lmdeploy()


@pytest.fixture
def pipeline() -> Iterator[Any]:
    """`turbofit.pipeline` on one RTX 3090, closed at the end."""
    opened = []

    def run(model: Any, *arguments: Any, **keywords: Any) -> Any:
        made = open_pipeline(str(model), *arguments, **{"on": "1xrtx3090", **keywords})
        opened.append(made)
        return made

    yield run
    for made in opened:
        if not made.async_engine.engine.closed:
            made.close()


@pytest.fixture
def image() -> Any:
    """A 1920x1080 image: nine tiles at the model's own limit."""
    return pytest.importorskip("PIL.Image").new("RGB", (1920, 1080))


def seen(pipe: Any) -> list[dict[str, Any]]:
    return pipe.async_engine.engine.requests


def test_every_way_to_ask(pipeline: Any, internvl2: Path, image: Any) -> None:
    pipe = pipeline(internvl2)
    assert isinstance(pipe, lmdeploy.Pipeline)
    assert [answer.text for answer in pipe(["a", "b"])] == ["ok", "ok"]
    for answer in (
        pipe("hi"), pipe.infer(("what?", image)), pipe.infer((image, "what?")),
        pipe.batch_infer([("what?", [image])])[0],
    ):  # fmt: skip
        assert answer.text == "ok"
    for stream in (pipe.stream_infer(("what?", image)), pipe.chat("hi", stream_response=True)):
        assert "".join(out.text or "" for out in stream) == "ok"
    assert pipe("hi", gen_config=lmdeploy.GenerationConfig(max_new_tokens=1)).text == "o"
    session = pipe.chat(("and this?", image), session=pipe.chat("hi"))
    assert [answer for _, answer in session.history] == ["ok", "ok"]
    assert pipe.session() is not None
    assert {tuple(request["units"]) for request in seen(pipe)} == {(), (9,)}


def test_what_lmdeploy_would_drop_is_refused_by_its_name(pipeline: Any, internvl2: Path) -> None:
    pipe = pipeline(internvl2)
    ask: Any
    for ask in (pipe, pipe.infer, pipe.stream_infer, pipe.chat):
        with pytest.raises(UsageError, match="drops max_new_tokens=8") as caught:
            ask("hi", max_new_tokens=8)
        assert "gen_config=GenerationConfig(max_new_tokens=8)" in caught.value.hint
        with pytest.raises(UsageError, match="drops top_n=3") as caught:
            ask("hi", top_n=3)
        assert "chat_template_kwargs" in caught.value.hint
    assert seen(pipe) == []
    template = {"chat_template_kwargs": {}, "do_preprocess": True, "enable_thinking": False}
    config = lmdeploy.GenerationConfig(max_new_tokens=1)
    assert pipe("hi", config, **template, mm_processor_kwargs=None).text == "o"
    assert pipe.infer("hi", config, True, None, True).text == "o"
    for name in ("max_new_tokens", "gpu_memory_utilization", "contxt"):
        with pytest.raises(UsageError, match=f"no keyword {name}"):
            pipeline(internvl2, **{name: 1})
    assert pipeline(internvl2, model_name="mine").async_engine.model_name == "mine"


def test_lmdeploys_engine_has_no_other_keywords() -> None:
    from lmdeploy.serve.core.async_engine import AsyncEngine
    from lmdeploy.serve.core.vl_async_engine import VLAsyncEngine

    named = {
        name
        for engine in (AsyncEngine, VLAsyncEngine)
        for name, parameter in inspect.signature(engine).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    known = {*inspect.signature(lmdeploy.pipeline).parameters, "backend"}
    assert named - known == {"model_name", "vision_config"} == set(_OF_LMDEPLOY)


def test_without_a_gpu_it_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        raise NoGpuError("NVML cannot be opened", hint="describe a machine with --on SPEC")

    monkeypatch.setattr(nvml_machine, "measure_in_time", nothing)
    with pytest.raises(NoGpuError) as error:
        open_pipeline("internvl2-2b")
    pretend = "a pipeline needs a GPU; turbofit pretend --on SPEC --model NAME"
    assert error.value.hint.startswith(pretend)


def test_the_planned_settings_reach_the_engine_which_closes_in_order(internvl2: Path) -> None:
    with turbofit.pipeline(
        str(internvl2), on="1xrtx3090", images=2, concurrency=5, context=4096, log_level="ERROR"
    ) as pipe:
        assert pipe("hi").text == "ok"
        plan, engine = pipe.plan, pipe.async_engine.engine
    config = engine.engine_config
    for name in ("cache_max_entry_count", "max_prefill_token_num", "session_len", "tp", "dtype"):
        assert getattr(config, name) == getattr(plan.engines[0].settings, name)
    assert (config.max_batch_size, config.session_len) == (5, 4096)
    assert plan.promise.limits.images_per_request == 2
    assert not config.enable_prefix_caching, "it would take get_ppl and all logits away"
    assert engine.closed


def test_the_callers_config_is_kept_and_not_touched(pipeline: Any, internvl2: Path) -> None:
    own = lmdeploy.TurbomindEngineConfig(
        session_len=2048, quant_policy=8, cache_max_entry_count=0.5, download_dir="/x",
        cache_prompt="all", num_tokens_per_iter=512,
    )  # fmt: skip
    before = dict(vars(own))
    with pytest.warns(UserWarning, match="num_tokens_per_iter of backend_config may take memory"):
        pipe = pipeline(internvl2, own)
    assert vars(own) == before
    config = pipe.async_engine.engine.engine_config
    assert config is not own
    assert (config.session_len, config.quant_policy, config.cache_max_entry_count) == (2048, 8, 0.5)
    assert (config.download_dir, config.cache_prompt) == ("/x", "all")
    assert (config.num_tokens_per_iter, pipe.plan.engines[0].settings.quant_policy) == (512, 8)


def test_what_cannot_be_planned_is_refused(pipeline: Any, internvl2: Path) -> None:
    tp = lmdeploy.TurbomindEngineConfig(tp=2)
    kept = lmdeploy.TurbomindEngineConfig(
        enable_prefix_caching=True, cache_prompt="all", cache_generation="none"
    )
    draft = importlib.import_module("lmdeploy.messages").SpeculativeConfig("eagle3")
    for config, keywords, words in (
        (object(), {}, "no config of LMDeploy"),
        (lmdeploy.PytorchEngineConfig(), {"engine": "turbomind"}, "of the pytorch engine, and"),
        (tp, {"tp": 1}, "tp is 2 in backend_config and 1"),
        (kept, {}, "cache_prompt and cache_generation of backend_config: the plan counts"),
        (None, {"replicas": 2}, "no keyword replicas"),
        (None, {"speculative_config": draft}, "has eagle3 for LlamaForCausalLM"),
    ):
        with pytest.raises(UsageError, match=words):
            pipeline(internvl2, config, **keywords)


def test_a_prediction_takes_the_settings_of_a_config() -> None:
    config = lmdeploy.TurbomindEngineConfig(tp=2, cache_max_entry_count=0.5)
    found = turbofit.predict("internvl2-8b", on="2xrtx3090", backend_config=config)
    told = turbofit.predict(
        "internvl2-8b", on="2xrtx3090", engine="turbomind", tp=2, cache_max_entry_count=0.5
    )
    assert found.engines[0].settings == told.engines[0].settings
    assert found.engines[0].kv == told.engines[0].kv


def test_what_does_not_fit_and_ranks_of_a_launcher_never_start(
    pipeline: Any, internvl2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        pipeline("internvl2-26b", on="1xrtx3060")
    assert caught.value.hint
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="whole engines"):
        pipeline(internvl2, on="2xrtx3090", tp=2)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of leases on a machine that has one RTX 3090."""
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    card = machine_from("1xrtx3090")
    monkeypatch.setattr(planner.Planner, "_machine", lambda self, *_: counted(card, self.leases))
    return tmp_path / "leases"


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("CUDA error")


@pytest.mark.parametrize("closes", [True, False])
def test_its_memory_is_reserved_until_it_is_closed(
    closes: bool, pipeline: Any, internvl2: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(internvl2, on=None)
    with Leases(here) as other:
        (lease,) = other.others()
        (ledger,) = pipe.plan.ledgers
        growth = ledger.peak - ledger.steady + open_margin(ledger)
        assert (lease.ready, lease.growth[ledger.uuid]) == (True, growth)
        if closes:
            pipe.close()
        else:
            with monkeypatch.context() as patched:
                patched.setattr(lmdeploy.Pipeline, "close", broken)
                with pytest.raises(RuntimeError, match="CUDA error"):
                    pipe.close()
        assert other.others() == []
    assert sorted(path.name for path in here.iterdir()) == ["lock"]


def test_nothing_is_left_of_an_engine_that_does_not_open_or_cannot_be_held(
    pipeline: Any, internvl2: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = []

    def refuse(engine: Any, _: Any) -> None:
        engines.append(engine)
        raise ImportError("no such module in this LMDeploy")

    with monkeypatch.context() as patched:
        patched.setattr(lmdeploy.Pipeline, "__init__", broken)
        with pytest.raises(RuntimeError, match="CUDA error"):
            pipeline(internvl2, on=None)
    monkeypatch.setattr(f"{PLANNED}.hold_engine", refuse)
    before = set(threading.enumerate())
    with Leases(here) as other:
        assert other.others() == []
        with pytest.raises(ImportError, match="no such module"):
            pipeline(internvl2, on=None)
        assert other.others() == []
    (engine,) = engines
    assert engine.engine.closed
    assert set(threading.enumerate()) <= before


def test_its_cache_is_no_share_of_what_others_have_yet_to_take(
    pipeline: Any, internvl2: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Leases(here) as other:
        other.reserve(plan(PlanRequest(model="internvl2-1b", on="1xrtx3090", budget="8GiB")))
        monkeypatch.setattr(gpu_monitor, "used_now", lambda one: {one.ledgers[0].index: 0})
        pipe = pipeline(internvl2, on=None)
    planned = pipe.plan.engines[0].settings.cache_max_entry_count
    (ledger,) = pipe.plan.ledgers
    region, more = (
        pipe.plan.engines[0].kv.region_bytes,
        ledger.total - ledger.reserved - ledger.free,
    )
    assert more > 4 * GIB
    sized = pipe.async_engine.engine.engine_config.cache_max_entry_count
    assert sized * (region / planned + more) == pytest.approx(region, rel=1e-4)


def part(image: Any, kind: str = "image_data", **asked: Any) -> dict[str, Any]:
    return {"type": kind, kind: {"data": image, **asked}}


def message(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "?"}, *parts]}]


@pytest.mark.parametrize(
    ("limit", "asked", "tiles"),
    [
        (None, {}, 9),
        (None, {"detail": "low"}, 3),
        (None, {"max_dynamic_patch": 40}, 9),
        (4, {"detail": "high"}, 3),
        (4, {"max_dynamic_patch": 24}, 3),
        (4, {"max_dynamic_patch": 1}, 1),
    ],
)
def test_tiles_are_held(limit, asked, tiles, pipeline, internvl2, image) -> None:
    pipe = pipeline(internvl2, max_dynamic_patch=limit)
    assert pipe(message(part(image, **asked))).text == "ok"
    assert pipe(message({"type": "image", "image": image, **asked})).text == "ok"
    assert [one["units"] for one in seen(pipe)] == [[tiles]] * 2
    assert tiles <= pipe.plan.promise.limits.units_per_image


def test_pixels_are_held(pipeline: Any, qwen2_vl: Path, image: Any) -> None:
    pipe = pipeline(qwen2_vl, max_pixels=401_408)
    for asked in ({}, {"max_pixels": 10**9}, {"min_pixels": 10**9}, {"max_pixels": "x"}):
        assert pipe(message(part(image, **asked))).text == "ok"
        (patches,) = seen(pipe)[-1]["units"]
        assert patches <= pipe.plan.promise.limits.units_per_image
        assert patches * 14 * 14 <= 401_408
    pipe.close()
    pipe = pipeline(qwen2_vl)  # the model's own
    assert (pipe(("?", image)).text, seen(pipe)[-1]["units"]) == ("ok", [78 * 138])
    # No preprocessor takes it.
    answer = pipe(("?", image.resize((4000, 10))))
    assert answer.finish_reason == "error"
    assert "200:1" in answer.error_message


@pytest.mark.parametrize(("limit", "tiles"), [(None, 9), (4, 3)])
def test_the_transformers_format_is_held_by_its_processor(
    limit: int | None, tiles: int, pipeline: Any, internvl_hf: Path, image: Any
) -> None:
    pipe = pipeline(internvl_hf, max_dynamic_patch=limit)
    assert pipe(message(part(image, detail="high", max_dynamic_patch=24))).text == "ok"
    assert seen(pipe)[-1]["units"] == [tiles]
    assert pipe(("?", [image] * 3)).text == "ok"  # without a knob they are resized
    units = seen(pipe)[-1]["units"]
    assert len(units) == 3
    assert sum(units) <= pipe.plan.promise.limits.units_per_request


def test_more_images_than_planned_share_the_units(pipeline, internvl2, image, caplog) -> None:
    pipe = pipeline(internvl2, images=2)
    most = pipe.plan.promise.limits.units_per_request
    assert (pipe(("?", [image, image])).text, seen(pipe)[-1]["units"]) == ("ok", [9, 9])
    assert pipe(("?", [image] * 5)).text == "ok"
    assert sum(seen(pipe)[-1]["units"]) <= most == 26
    answer = pipe(("?", [image] * 27))
    assert answer.finish_reason == "error"
    assert "27 images in a request, the limit is 26" in answer.error_message
    said = [one.getMessage() for one in caplog.records if one.name.startswith("turbofit")]
    images = "27 images in a request, the limit is 26"
    assert said == [f"a request is refused (invalid_request): {images}"]
    assert len(seen(pipe)) == 2
    session = None
    for turn in range(1, 5):  # a chat goes on with a picture in each
        session = pipe.chat(("?", image), session=session)
        assert session.response.text == "ok"
        assert len(seen(pipe)[-1]["units"]) == turn
        assert sum(seen(pipe)[-1]["units"]) <= most
    assert image.size == (1920, 1080)


def test_remote_code_is_asked_for_only_where_it_is_needed(internvl2, monkeypatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(
        f"{PLANNED}.PlannedPipeline",
        lambda *_, trust_remote_code, **__: given.append(trust_remote_code),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_pipeline(str(internvl2), on="1xrtx3090")
        for trusted in (False, True):
            open_pipeline("internvl2-8b", on="1xrtx3090", trust_remote_code=trusted)
    with pytest.warns(UserWarning, match="code of its own repository"):
        open_pipeline("internvl2-8b", on="1xrtx3090")
    assert given == [False, False, True, True]


def test_the_planned_group_is_all_that_the_engine_sees(internvl2, tmp_path, nvml_library) -> None:
    scenario = Scenario(gpus=[gpu_3090(i) for i in range(3)])
    with in_process(nvml_library, scenario, tmp_path):
        with open_pipeline(str(internvl2), gpus="2") as pipe:
            assert os.environ["CUDA_VISIBLE_DEVICES"] == scenario.gpus[2].uuid
            assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
            assert pipe.backend_config.devices is None
        own = lmdeploy.TurbomindEngineConfig(devices=[1])
        os.environ["CUDA_VISIBLE_DEVICES"] = "1,2"
        with open_pipeline(str(internvl2), own) as pipe:
            assert (os.environ["CUDA_VISIBLE_DEVICES"], own.devices) == (scenario.gpus[2].uuid, [1])
        with pytest.raises(UsageError, match="devices"):
            open_pipeline(str(internvl2), lmdeploy.TurbomindEngineConfig(devices=[7]))


def test_the_signature_is_lmdeploys() -> None:
    theirs = inspect.signature(lmdeploy.pipeline).parameters
    ours = inspect.signature(open_pipeline).parameters
    assert list(theirs)[:-1] == list(ours)[:-1]
    for name in list(theirs)[:-1]:
        if name != "trust_remote_code":
            assert ours[name].default == theirs[name].default


def test_what_else_this_process_runs_is_not_held_to_the_plan() -> None:
    """Torch's allocator is one for the process: the rest of a budget's card is for other models."""
    whole, part = (
        api.plan("qwen2-vl-2b", on="1xrtx3090", engine="pytorch", budget=size)
        for size in (None, "12GiB")
    )
    plain, more = lmdeploy.PytorchEngineConfig(), lmdeploy.PytorchEngineConfig(num_cpu_blocks=8)
    assert held_to(whole, planned_config(whole, plain)) == whole.ledgers
    assert held_to(whole, planned_config(whole, more)) == ()
    assert held_to(part, planned_config(part, plain)) == ()


def test_pytorch_fields_are_planned_with_under_their_own_names() -> None:
    backend_config = lmdeploy.PytorchEngineConfig(
        session_len=4096, quant_policy=8, eager_mode=True, block_size=32, download_dir="/x"
    )
    assert config_engine(backend_config, "auto") == "pytorch"
    planning = with_config({"on": "1xrtx3090"}, backend_config, "pytorch")
    assert planning["cache_block_seq_len"] == 32
    assert (planning["quant_policy"], planning["eager_mode"]) == (8, True)
    plan = api.plan("qwen2-vl-7b", engine="pytorch", **planning)
    config = planned_config(plan, backend_config)
    assert config is not backend_config
    assert (config.session_len, config.block_size, config.download_dir) == (4096, 32, "/x")
    assert config.cache_max_entry_count == plan.engines[0].settings.cache_max_entry_count
    assert config.max_batch_size == plan.engines[0].settings.max_batch_size
    assert backend_config.max_batch_size is None
    made = planned_config(plan, None)  # the plan makes one
    assert type(made) is lmdeploy.PytorchEngineConfig
    assert made.max_prefill_token_num == plan.engines[0].settings.max_prefill_token_num
