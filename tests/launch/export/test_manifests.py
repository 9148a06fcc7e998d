"""Each manifest is read by the checker of the tool that it is for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

import turbofit.api
from turbofit.cli.main import main
from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.core.plan import Plan
from turbofit.launch.export.compose import compose_file
from turbofit.launch.export.k8s import k8s_objects
from turbofit.launch.export.service import Service, service_of
from turbofit.launch.export.systemd import systemd_unit

CASES: dict[str, dict[str, Any]] = {
    "two copies": {"model": "internvl2-8b", "on": "2xrtx4090"},
    "tp 4": {"model": "internvl2-8b", "on": "4xrtx3090", "tp": 4},
    "unequal": {"model": "internvl2-8b", "on": "2xrtx4080+rtx3090"},
    "ray": {"model": "cogvlm-17b", "on": "2xrtx3090,ram=64GiB"},
    "transformers": {"model": "llava-onevision-7b", "on": "1xrtx4090"},
    "drafts": {
        "model": "glm-4.5-air", "on": "4xa100-80g", "engine": "pytorch", "tp": 4,
        "speculative_algorithm": "deepseek_mtp", "speculative_num_draft_tokens": 2,
    },
    "promises": {
        "model": "qwen2-vl-7b", "on": "1xrtx3090", "max_pixels": 1003520, "images": 2,
        "context": 8192, "concurrency": 4, "goal": "latency", "margin": "1GiB",
    },
}  # fmt: skip


def plan_of(case: str) -> Plan:
    options = dict(CASES[case])
    return turbofit.api.plan(options.pop("model"), **options)


@pytest.fixture(params=CASES)
def service(request: pytest.FixtureRequest) -> Service:
    return service_of(plan_of(request.param), port=23333, host="0.0.0.0")


def measured(plan: Plan) -> Plan:
    """As if NVML had answered."""
    return replace(plan, machine=replace(plan.machine, source="nvml"))


def again(service: Service) -> dict[str, Any]:
    """What the next start would plan with: the command's own answer, on the same machine."""
    return {word: service.argv[i + 1] for i, word in enumerate(service.argv) if word[:2] == "--"}


def test_the_command_asks_for_what_the_plan_promised() -> None:
    service = service_of(plan_of("promises"), port=8000, host="127.0.0.1")
    assert service.argv[:3] == ("turbofit", "serve", "Qwen/Qwen2-VL-7B-Instruct")
    assert again(service) == {
        "--engine": "turbomind", "--tp": "1", "--replicas": "1", "--images": "2",
        "--context": "8192", "--concurrency": "4", "--goal": "latency", "--max-pixels": "1003520",
        "--margin": str(1 << 30), "--host": "127.0.0.1", "--port": "8000",
    }  # fmt: skip


def test_what_is_the_default_is_left_out() -> None:
    asked = again(service_of(plan_of("tp 4"), port=23333, host="0.0.0.0"))
    assert asked.pop("--tp") == "4"
    assert asked == {
        "--engine": "turbomind", "--replicas": "1", "--host": "0.0.0.0", "--port": "23333",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_next_start_plans_the_same(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(case)
    words = service_of(plan, port=23333, host="0.0.0.0").argv[2:]
    model, *options = words[: words.index("--host")]
    assert main(["plan", model, *options, "--on", CASES[case]["on"], "--json"]) == 0
    next_plan = Plan.from_json(capsys.readouterr().out)
    assert next_plan.settings == plan.settings
    assert next_plan.limits == plan.limits
    assert next_plan.parallel.groups == plan.parallel.groups
    assert next_plan.by_group == plan.by_group


@pytest.mark.parametrize(
    ("queue", "option"), [(True, "--queue-images"), (False, "--no-queue-images")]
)
def test_whether_images_queue_is_kept_where_somebody_said_it(queue: bool, option: str) -> None:
    plan = turbofit.api.plan("internvl2-8b", on="1xrtx3090", queue_images=queue)
    assert option in service_of(plan, port=1, host="127.0.0.1").argv
    free = turbofit.api.plan("internvl2-8b", on="1xrtx3090")
    assert not [word for word in service_of(free, port=1, host="127.0.0.1").argv if "queue" in word]


def test_what_has_no_limit_asks_for_none() -> None:
    plan = turbofit.api.plan("internvl2-8b", on="1xrtx3090", images=0)
    words = service_of(plan, port=1, host="127.0.0.1").argv
    assert "None" not in words
    assert "--images" in words
    text = turbofit.api.plan("internvl2-8b", on="1xrtx3090", language_model_only=True)
    assert "--language-model-only" in service_of(text, port=1, host="127.0.0.1").argv


def test_a_copy_of_transformers_over_two_cards() -> None:
    plan = turbofit.api.plan("qwen2-vl-7b", on="2xl4:free=10GiB", engine="transformers")
    assert len(plan.parallel.groups[0]) == 2
    assert again(service_of(plan, port=1, host="127.0.0.1"))["--tp"] == "2"


def test_margins_of_their_own_are_not_one_option() -> None:
    plan = turbofit.api.plan("internvl2-2b", on="rtx3090+l40s", budget="20GiB")
    assert plan.fits
    with pytest.raises(UsageError, match="margins of their own"):
        service_of(plan, port=1, host="127.0.0.1")


def test_a_context_lowered_to_the_cache_is_left_to_the_next_start() -> None:
    plan = turbofit.api.plan("internvl2-8b", on="1xl4:free=19GiB")
    assert plan.settings.session_len < plan.model.text.max_position_embeddings
    assert "--context" not in service_of(plan, port=1, host="127.0.0.1").argv


def test_what_does_not_fit_is_not_exported() -> None:
    plan = turbofit.api.plan("internvl2-26b-awq", on="1xrtx3060")
    with pytest.raises(DoesNotFitError, match="does not serve"):
        service_of(plan, port=23333, host="127.0.0.1")


def test_names() -> None:
    plan = plan_of("two copies")
    assert service_of(plan, port=1, host="h").name == "turbofit-internvl2-8b"
    assert service_of(plan, port=1, host="h", name="My VLM!").name == "my-vlm"
    with pytest.raises(UsageError):
        service_of(plan, port=1, host="h", name="!!")


def test_shared_memory_for_ranks_that_meet_there() -> None:
    assert service_of(plan_of("two copies"), port=1, host="h").shm == 0
    assert service_of(plan_of("tp 4"), port=1, host="h").shm == 1 << 30
    ray = service_of(plan_of("ray"), port=1, host="h").shm
    assert ray == (1 << 30) + int(0.3 * (64 << 30))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("real", [False, True])
def test_systemd_reads_the_unit(service: Service, real: bool, tmp_path: Path) -> None:
    if real:
        service = replace(service, uuids=tuple(f"GPU-{i}" for i in range(service.gpus)))
    unit = tmp_path / f"{service.name}.service"
    executable = shutil.which("true") or ""
    unit.write_text(systemd_unit(service, executable=executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, str(unit) in done.stderr) == (0, False), done.stderr
    assert ("CUDA_VISIBLE_DEVICES=GPU-0" in unit.read_text()) == real


def test_systemd_keeps_its_own_signs() -> None:
    plan = plan_of("two copies")
    odd = replace(service_of(plan, port=1, host="h"), argv=("turbofit", "serve", "/m/a b%c$d"))
    line = next(
        line
        for line in systemd_unit(odd, executable="/usr/bin/turbofit").splitlines()
        if line.startswith("ExecStart")
    )
    assert line == "ExecStart=/usr/bin/turbofit serve '/m/a b%%c$$d'"


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
def test_compose_reads_the_file(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text(compose_file(service, image="turbofit:test"))
    done = subprocess.run(
        ["docker-compose", "-f", str(path), "config"],
        env=os.environ | {"TURBOFIT_API_KEYS": "k"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_compose_publishes_on_loopback_and_names_the_cards() -> None:
    plan = measured(plan_of("two copies"))
    service = service_of(plan, port=23333, host="0.0.0.0")
    body = yaml.safe_load(compose_file(service, image="i"))["services"][service.name]
    assert body["ports"] == ["127.0.0.1:23333:23333"]
    (device,) = body["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == [gpu.uuid for gpu in plan.gpus]
    assert "count" not in device
    assert body["environment"]["TURBOFIT_API_KEYS"].startswith("${TURBOFIT_API_KEYS:?")


def test_a_manifest_runs_turbofit_once_whatever_the_images_entrypoint_is() -> None:
    service = service_of(plan_of("two copies"), port=23333, host="0.0.0.0")
    body = yaml.safe_load(compose_file(service, image="i"))["services"][service.name]
    assert body["entrypoint"] == list(service.argv)
    assert "command" not in body
    deployment, _ = yaml.safe_load_all(k8s_objects(service, image="i"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"] == list(service.argv)  # Kubernetes' word for an entry point
    for folder, volumes in (
        (body["environment"]["HF_HOME"], [one.split(":")[1] for one in body["volumes"]]),
        (
            next(one["value"] for one in container["env"] if one["name"] == "HF_HOME"),
            [one["mountPath"] for one in container["volumeMounts"]],
        ),
    ):
        assert folder in volumes


@pytest.mark.parametrize("claim", [None, "hub"])
def test_kubernetes_reads_the_objects(service: Service, claim: str | None) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    text = k8s_objects(service, image="turbofit:test", claim=claim)
    assert "&id" not in text
    deployment, front = yaml.safe_load_all(text)
    for one in (deployment, front):
        validate.validate(one, "1.30", strict=True)
    assert front["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == service.gpus
    mounted = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == mounted
    start = container["startupProbe"]
    assert start["failureThreshold"] * start["periodSeconds"] >= service.start
    assert pod["terminationGracePeriodSeconds"] == service.stop


def test_deadlines_are_the_supervisors() -> None:
    from turbofit.launch.engine.supervised_engine import Timing
    from turbofit.launch.serve import supervisor as serve

    service = service_of(plan_of("two copies"), port=1, host="h")
    assert service.start == Timing().start
    assert service.stop >= Timing().drain + serve._LAST_SECONDS


def test_a_folder_is_mounted_where_it_lies() -> None:
    plan = plan_of("two copies")
    source = replace(plan.model.source, kind="folder", checkpoint="/models/own")
    plan = replace(plan, model=replace(plan.model, source=source))
    service = service_of(plan, port=23333, host="0.0.0.0")
    body = yaml.safe_load(compose_file(service, image="i"))["services"][service.name]
    assert "/models/own:/models/own:ro" in body["volumes"]
    deployment, _ = yaml.safe_load_all(k8s_objects(service, image="i"))
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"path": "/models/own", "type": "Directory"} in [v.get("hostPath") for v in volumes]


class TestCommand:
    """``turbofit export``."""

    @pytest.fixture
    def saved(self, tmp_path: Path) -> str:
        path = tmp_path / "plan.json"
        path.write_text(plan_of("two copies").to_json())
        return str(path)

    @pytest.mark.parametrize(
        ("kind", "begins"),
        [("systemd", "[Unit]"), ("compose", "services:"), ("k8s", "kind: Deployment")],
    )
    def test_writes(self, kind: str, begins: str, saved: str, capsys) -> None:
        assert main(["export", kind, saved]) == 0
        assert begins in capsys.readouterr().out.splitlines()

    def test_as_json(self, saved: str, capsys) -> None:
        assert main(["export", "k8s", saved, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["gpus"] == 2
        assert told["argv"][0] == "turbofit"

    def test_a_containers_network_is_its_own(self, saved: str, capsys) -> None:
        assert main(["export", "compose", saved, "--host", "127.0.0.1"]) == 2
        assert "hint:" in capsys.readouterr().err


def test_what_drafts_is_asked_for_again() -> None:
    asked = again(service_of(plan_of("drafts"), port=8000, host="127.0.0.1"))
    assert asked["--speculative-algorithm"] == "deepseek_mtp"
    assert asked["--speculative-num-draft-tokens"] == "2"
