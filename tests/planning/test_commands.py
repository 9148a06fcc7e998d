"""The commands that start engines, and `turbofit serve`, which promises no less."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from msgspec.structs import replace

import turbofit
from tests.serving.fallback.support import tiny_map
from tests.support.checkpoints import make_internvl2
from tests.support.plans import gpu, machine, model, plausible_plan
from turbofit import api
from turbofit.cli.main import TURBOFIT, main
from turbofit.cli.options.field_options import filled
from turbofit.core.errors import UsageError
from turbofit.core.model import ModelSource
from turbofit.core.plan import Plan, ServeCommand, Settings
from turbofit.planning.commands import (
    came_later,
    commands,
    folded,
    model_path,
    read_map,
)
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest
from turbofit.report.views.figures import shell_words
from turbofit.serving.cluster.actors import cluster_from

pytestmark = pytest.mark.slow

Out = pytest.CaptureFixture[str]


def test_one_command_a_group_on_consecutive_ports() -> None:
    first, second = commands(plausible_plan(gpus=4, tp=2), port=9000)
    assert first.argv[:4] == ("lmdeploy", "serve", "api_server", "OpenGVLab/InternVL2-8B")
    assert first.argv[-6:-2] == ("--server-name", "127.0.0.1", "--server-port", "9000")
    assert "9001" in second.argv
    assert first.env == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": f"{gpu(0).uuid},{gpu(1).uuid}",
        "TM_LOG_LEVEL": "INFO",
    }
    assert second.env["CUDA_VISIBLE_DEVICES"] == f"{gpu(2).uuid},{gpu(3).uuid}"
    assert "--trust-remote-code" in first.argv
    plain = plausible_plan(model=model(needs_remote_code=False))
    assert "--trust-remote-code" not in plain.engines[0].command.argv


def test_a_local_checkpoint_keeps_its_name_and_a_revision_is_passed_where_lmdeploy_downloads():
    source = ModelSource(kind="hub_cache", where="cache", sizes="file", checkpoint="/hub/snap")
    argv = plausible_plan(model=model(source=source)).engines[0].command.argv
    assert argv[3] == "/hub/snap"
    assert argv[argv.index("--model-name") + 1] == "OpenGVLab/InternVL2-8B"
    folder = model(source=source, hub_id=None)
    assert "--model-name" not in plausible_plan(model=folder).engines[0].command.argv
    assert model_path(model(hub_id=None)) == "internvl2-8b"
    argv = plausible_plan(model=model(revision="v1")).engines[0].command.argv
    assert argv[argv.index("--revision") + 1] == "v1"
    assert "--revision" not in plausible_plan().engines[0].command.argv


@pytest.mark.lmdeploy
@pytest.mark.parametrize(
    "settings",
    [
        Settings(tp=4, cache_max_entry_count=0.873, max_batch_size=8),
        Settings(
            tp=2, dtype="float16", cache_max_entry_count=0.001, max_prefill_token_num=1024,
            max_batch_size=1, session_len=2048, quant_policy=4, cache_block_seq_len=128,
            communicator="cuda-ipc", async_=0, enable_prefix_caching=True, model_format="awq",
            language_model_only=True,
        ),
    ],
)  # fmt: skip
def test_lmdeploy_reads_exactly_the_planned_settings(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own command line, with the server replaced by a recorder."""
    import lmdeploy.archs
    import lmdeploy.serve.openai.api_server
    from lmdeploy import TurbomindEngineConfig
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe

    if "api_server" not in SubCliServe.subparsers.choices:
        SubCliServe.add_parsers()
    plan = plausible_plan(settings=settings)
    args = CLI.parser.parse_args(list(commands(plan, port=8123)[0].argv[1:]))
    given: dict[str, Any] = {}
    monkeypatch.setattr(lmdeploy.archs, "autoget_backend", lambda *_, **__: "turbomind")
    server = sys.modules["lmdeploy.serve.openai.api_server"]
    monkeypatch.setattr(server, "serve", lambda path, **rest: given.update(path=path, **rest))
    args.run(args)
    config = given["backend_config"]
    assert type(config) is TurbomindEngineConfig
    # What is not planned is LMDeploy's own.
    assert vars(config) == {**vars(TurbomindEngineConfig()), **plan.engines[0].lmdeploy_settings()}
    assert given["path"] == "OpenGVLab/InternVL2-8B"
    assert (given["server_name"], given["server_port"]) == ("127.0.0.1", 8123)
    assert (given["log_level"], given["trust_remote_code"]) == ("WARNING", True)


def test_runs_of_layers_are_folded_and_what_is_no_map_is_refused():
    placed = tiny_map([0, 0, "cpu", 1])
    text = folded(placed)
    assert '"model.language_model.layers.0-1":0' in text
    assert '"model.language_model.layers.2":"cpu"' in text
    assert read_map(text) == placed
    for wrong in ("{", "nowhere.json", '{"m": "gpu"}', '{"m.layers.3-1": 0}', "[" * 9999):
        with pytest.raises(UsageError, match="device map"):
            read_map(wrong)


def predicted(version: str, engine: str = "turbomind", **options: object) -> Plan:
    return turbofit.predict(
        "internvl2-8b", on="2xa100-80g", lmdeploy=version, engine=engine, tp=2, **options
    )


def options_of(plan: Plan) -> set[str]:
    return {word for word in plan.engines[0].command.argv if word.startswith("--")}


@pytest.mark.parametrize(
    ("option", "last_without", "first_with"),
    [
        ("--communicator", "0.7.1", "0.7.2"),
        ("--max-prefill-token-num", "0.5.3", "0.6.0"),
        ("--cache-block-seq-len", "0.2.6", "0.3.0"),
        ("--trust-remote-code", "0.12.3", "0.13.0"),
    ],
)
def test_an_option_stands_in_commands_from_its_release_on(option, last_without, first_with):
    model = "llama-2-7b" if option == "--cache-block-seq-len" else "internvl2-8b"
    without, with_it = (
        turbofit.predict(model, on="1xa100-80g", lmdeploy=version, engine="turbomind")
        for version in (last_without, first_with)
    )
    assert option not in options_of(without)
    assert option in options_of(with_it)
    # A usual value needs no word: the release does so without the option.
    assert not [text for text in without.warnings if option in text]


def test_what_a_release_cannot_be_told_is_said_first_with_the_release_that_can():
    made = predicted("0.5.3", max_prefill_token_num=4096, dtype="float16", async_=0)
    said = made.warnings[0]
    for words in (
        "api_server of LMDeploy 0.5.3 has no", "--max-prefill-token-num 4096 (from 0.6.0 on)",
        "--dtype float16 (from 0.6.1 on)", "--async 0 (from 0.12.0 on)",
    ):  # fmt: skip
        assert words in said
    assert not {"--max-prefill-token-num", "--dtype", "--async"} & options_of(made)
    assert (
        made.engines[0].settings.max_prefill_token_num == 4096
    )  # what is predicted stays what was asked
    # A value can be newer than its option.
    made = predicted("0.9.2", communicator="cuda-ipc")
    assert "--communicator" not in options_of(made)
    assert "no --communicator cuda-ipc (from 0.10.0 on)" in made.warnings[0]
    assert came_later(("--communicator", "native"), "0.9.2") is None


def serve_options_of(serve: ServeCommand) -> dict[str, Any]:
    """What the parser of `serve` makes of the words, pasted into a shell."""
    words = shlex.split(shell_words(serve.argv).replace("\\\n", ""))
    assert words == list(serve.argv)
    assert words[:2] == ["turbofit", "serve"]
    command = TURBOFIT.get_command(click.Context(TURBOFIT), "serve")
    with command.make_context("turbofit serve", words[2:]) as context:
        return dict(context.params)


def request_of(plan: Plan) -> PlanRequest:
    return filled(PlanRequest, serve_options_of(plan.serve))


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
    assert served.backend.name == plan.backend.name
    for limit in ("image_limit", "units_per_image", "images_per_request"):
        assert getattr(served.promise.limits, limit) == getattr(plan.promise.limits, limit)
    assert served.promise.context == plan.promise.context
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
        assert document["engines"][0]["command"]["argv"][0] == "lmdeploy"
        serve = document["serve"]["argv"]
        assert Plan.from_json(json.dumps({**document, "serve": None})).serve is None  # an older one
        assert request_of(Plan.from_json(json.dumps(document))).model == str(folder)
    monkeypatch.chdir("/")
    assert main([*serve[1:], "--dry-run", "--on", "1xrtx3090"]) == 0


def test_a_revision_of_the_hub_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request = request_of(api.plan("OpenGVLab/InternVL2-2B", on="1xrtx3090", revision="v1"))
    assert (request.model, request.revision) == ("OpenGVLab/InternVL2-2B", "v1")
    source = ModelSource(kind="hub_cache", where="cache", sizes="file", checkpoint="/hub/snap")
    read = api.plan(model(source=source, revision="v2"), on="1xa100-80g")
    assert (request_of(read).model, request_of(read).revision) == ("OpenGVLab/InternVL2-8B", "v2")


def test_a_prediction_is_served_with_its_settings() -> None:
    asked = {"model": "internvl2-8b", "on": "4xrtx3090", "tp": 4}
    plan = api.predict(**asked, session_len=8192)
    request = request_of(plan)
    assert request.cache_max_entry_count == plan.engines[0].settings.cache_max_entry_count == 0.8
    assert (request.tp, request.session_len, request.engine) == (4, 8192, "turbomind")
    served = best_plan(request.changed(on="4xrtx3090"))
    assert served.fits
    assert served.engines[0].settings == plan.engines[0].settings
    assert api.predict(**asked, lmdeploy="0.14").serve is None


def test_lmdeploys_options_stay_behind_the_dashes(capsys: Out) -> None:
    words = ["serve", "internvl2-2b", "--on", "1xrtx3090", "--dry-run"]
    words += ["--quant-policy", "8", "--model-name", "a b"]
    rest = ["--tool-call-parser", "internlm"]
    assert main([*words, "--json", "--", *rest]) == 0
    given = serve_options_of(Plan.from_json(capsys.readouterr().out).serve)
    assert given["rest"] == ["--tool-call-parser", "internlm"]
    assert given["model_name"] == "a b"  # an option of serve itself
    assert given["quant_policy"] == "8"
    assert main([*words, "--", *rest]) == 0
    said = capsys.readouterr().out
    assert said.index("holds no limits") < said.index("lmdeploy serve api_server")
    assert said.startswith("# ")  # a shell passes it by


def test_a_cluster_is_served_by_ray() -> None:
    simulated = cluster_from("sim:4xrtx3090@2")
    plan = api.plan_cluster("internvl2-8b", simulated, concurrency=8)
    request = request_of(plan)
    assert (request.context, request.max_dynamic_patch, request.concurrency) == (32768, 12, 8)
    assert serve_options_of(plan.serve)["cluster"] == "ray"
    real = replace(simulated, source="ray 10.0.0.1:6379")
    given = serve_options_of(api.plan_cluster("internvl2-8b", real, concurrency=8).serve)
    assert (given["context"], given["cluster"]) == (None, "ray:10.0.0.1:6379")
    none = api.plan_cluster("internvl2-76b", cluster_from("sim:1xrtx3060@2"))
    assert (none.fits, none.serve) == (False, None)
