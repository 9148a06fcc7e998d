"""What is handed out to copy: `turbofit serve` takes it as it stands, and promises no less."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from msgspec.structs import replace

from tests.support.checkpoints import make_internvl2
from tests.support.plans import machine, model
from turbofit import api
from turbofit.cli.command_group import TURBOFIT
from turbofit.cli.main import main
from turbofit.cli.options.common_options import filled
from turbofit.core.model import ModelSource
from turbofit.core.plan import Plan, ServeCommand
from turbofit.launch.cluster.nodes import cluster_from
from turbofit.planning.joint_plan import joint_plan
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest
from turbofit.report.views.figures import shell_words

pytestmark = pytest.mark.slow

Out = pytest.CaptureFixture[str]


def options_of(serve: ServeCommand) -> dict[str, Any]:
    """What the parser of `serve` makes of the words, pasted into a shell."""
    words = shlex.split(shell_words(serve.argv).replace("\\\n", ""))
    assert words == list(serve.argv)
    assert words[:2] == ["turbofit", "serve"]
    command = TURBOFIT.get_command(click.Context(TURBOFIT), "serve")
    with command.make_context("turbofit serve", words[2:]) as context:
        return dict(context.params)


def request_of(plan: Plan) -> PlanRequest:
    given = options_of(plan.serve)
    (name,) = given["model"]
    return filled(PlanRequest, {**given, "model": name})


@pytest.mark.parametrize(
    ("name", "on", "given"),
    [
        ("internvl2-8b", "4xrtx3090", {}),
        ("internvl2-8b", "rtx3090+rtx4090", {"images": 3}),
        ("qwen2-vl-7b", "1xv100-32g", {"max_pixels": 1003520, "context": 8192, "concurrency": 4}),
        ("OpenGVLab/InternVL2-2B", "1xl4:free=19GiB", {"goal": "latency", "margin": "3%"}),
        ("internvl3-8b", "1xrtx4090", {"image_size": (1920, 1080), "least": True}),
        ("llava-1.5-7b", "1xl4", {}),  # images of one size
        ("idefics3-8b", "1xl4", {"image_size": (1920, 1080)}),  # Transformers
        ("qwen2.5-7b", "1xrtx3090", {"quant_policy": 8, "enable_prefix_caching": True}),  # text
        ("cogvlm-17b", "2xrtx3090", {"cudagraph_capture_batch_sizes": (1, 2, 4)}),  # PyTorch engine
        ("internvl2-2b", "2xrtx3090", {"language_model_only": True, "tp": 1, "replicas": 2}),
        ("qwen2-vl-2b", "1xrtx3090", {"queue_images": False, "session_len": 16384, "async_": 0}),
    ],
)  # fmt: skip
def test_it_promises_no_less_on_the_machine_that_was_planned_for(
    name: str, on: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = api.plan(name, on=on, **given)
    request = request_of(plan)
    assert request.model == name
    served = best_plan(request.changed(on=on))
    assert plan.fits
    assert served.fits
    assert served.engine.name == plan.engine.name
    for limit in ("image_limit", "units_per_image", "images_per_request"):
        assert getattr(served.limits, limit) == getattr(plan.limits, limit)
    assert served.kv.longest_request_tokens == plan.kv.longest_request_tokens
    assert served.requests_at_once >= plan.requests_at_once


def test_for_another_machine_it_names_the_limits() -> None:
    plan = api.plan("internvl2-8b", on="4xrtx3090", tp=4)
    assert plan.serve.argv == (
        "turbofit", "serve", "internvl2-8b", "--tp", "4", "--images", "1", "--context", "32768",
        "--max-dynamic-patch", "12",
    )  # fmt: skip
    assert request_of(api.plan("qwen2-vl-7b", on="2xrtx4090")).max_pixels == 12845056
    session = request_of(api.plan("internvl2-8b", on="4xrtx3090", session_len=4096))
    assert (session.context, session.session_len) == (None, 4096)
    snapshot = replace(machine(1), source="snapshot card.json", visible=(0,))
    assert request_of(api.plan("internvl2-8b", on=snapshot)).context == 32768


def test_a_folder_is_named_wherever_it_is_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    folder = make_internvl2(tmp_path / "my models" / "it's InternVL2")
    monkeypatch.chdir(folder.parent)
    for command in ("predict", "plan"):
        assert main([command, f"./{folder.name}", "--on", "1xrtx3090", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert [one["holds_limits"] for one in document["commands"]] == [False]
        serve = document["serve"]["argv"]
        assert Plan.from_json(json.dumps({**document, "serve": None})).serve is None  # an older one
        assert request_of(Plan.from_json(json.dumps(document))).model == str(folder)
    monkeypatch.chdir("/")
    assert main([*serve[1:], "--dry-run", "--on", "1xrtx3090"]) == 0


def test_a_revision_of_the_hub_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = api.plan("OpenGVLab/InternVL2-2B", on="1xrtx3090", revision="v1")
    request = request_of(plan)
    assert (request.model, request.revision) == ("OpenGVLab/InternVL2-2B", "v1")
    source = ModelSource(kind="hub_cache", where="cache", sizes="file", checkpoint="/hub/snap")
    cached = model(source=source, revision="v2")
    read = api.plan(cached, on="1xa100-80g")
    assert (request_of(read).model, request_of(read).revision) == ("OpenGVLab/InternVL2-8B", "v2")


def test_a_prediction_is_served_with_its_settings() -> None:
    asked = {"model": "internvl2-8b", "on": "4xrtx3090", "tp": 4}
    plan = api.predict(**asked, session_len=8192)
    request = request_of(plan)
    assert request.cache_max_entry_count == plan.settings.cache_max_entry_count == 0.8
    assert (request.tp, request.session_len, request.engine) == (4, 8192, "turbomind")
    served = best_plan(request.changed(on="4xrtx3090"))
    assert served.fits
    assert served.settings == plan.settings
    assert api.predict(**asked, lmdeploy="0.14").serve is None


def test_lmdeploys_options_stay_behind_the_dashes(capsys: Out) -> None:
    words = ["serve", "internvl2-2b", "--on", "1xrtx3090", "--dry-run"]
    rest = ["--tool-call-parser", "internlm", "--quant-policy", "8", "--model-name", "a b"]
    assert main([*words, "--json", "--", *rest]) == 0
    plan = Plan.from_json(capsys.readouterr().out)
    given = options_of(plan.serve)
    assert given["rest"] == ["--tool-call-parser", "internlm"]
    assert given["model_name"] == "a b"  # an option of serve itself
    assert given["quant_policy"] == "8"
    assert main([*words, "--", *rest]) == 0
    said = capsys.readouterr().out
    assert said.index("holds no limits") < said.index("lmdeploy serve api_server")
    assert said.startswith("# ")  # a shell passes it by


def test_several_models_are_served_at_one_address() -> None:
    def served(*models: tuple[str, dict[str, Any]]) -> Any:
        return joint_plan([PlanRequest(model=m, on="1xrtx3090", **more) for m, more in models])

    two = {"images": 2}
    found = served(("internvl2-1b", two), ("llava-1.5-7b", two))
    given = options_of(found.serve)
    assert given["model"] == ("internvl2-1b", "llava-1.5-7b")
    assert filled(PlanRequest, {**given, "model": "-"}).images == 2
    assert len({plan.kv.longest_request_tokens for plan in found.plans}) == 2
    assert given["context"] is None  # one line cannot name both
    alike = served(("internvl2-2b", {"images": 1}), ("qwen2-vl-2b", {"images": 1}))
    assert {plan.kv.longest_request_tokens for plan in alike.plans} == {32768}
    assert options_of(alike.serve)["context"] == "32768"
    short, none = {"context": 4096}, {"context": 4096, "images": 0}
    assert served(("internvl2-2b", {**two, **short}), ("qwen2-vl-2b", two)).serve is None
    assert served(("internvl2-2b", short), ("qwen2.5-0.5b", none)).serve is not None
    blind = served(("internvl2-2b", none), ("qwen2-vl-2b", none))
    assert options_of(blind.serve)["images"] == "0"


def test_a_cluster_is_served_by_ray() -> None:
    simulated = cluster_from("sim:4xrtx3090@2")
    plan = api.plan_cluster("internvl2-8b", simulated, concurrency=8)
    request = request_of(plan)
    assert (request.context, request.max_dynamic_patch, request.concurrency) == (32768, 12, 8)
    assert options_of(plan.serve)["cluster"] == "ray"
    real = replace(simulated, source="ray 10.0.0.1:6379")
    given = options_of(api.plan_cluster("internvl2-8b", real, concurrency=8).serve)
    assert (given["context"], given["cluster"]) == (None, "ray:10.0.0.1:6379")
    none = api.plan_cluster("internvl2-76b", cluster_from("sim:1xrtx3060@2"))
    assert (none.fits, none.serve) == (False, None)
