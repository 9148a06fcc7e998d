"""Each manifest is read by the checker of the tool that it is for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec import UNSET
from msgspec.structs import replace

import turbofit.api
from turbofit.cli.main import main
from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.core.plan import Plan
from turbofit.launch.export import Service, manifest, service_of

CASES: dict[str, dict[str, Any]] = {
    "two copies": {"model": "internvl2-8b", "on": "2xrtx4090"},
    "tp 4": {"model": "internvl2-8b", "on": "4xrtx3090", "tp": 4},
    "unequal": {"model": "internvl2-8b", "on": "2xrtx4080+rtx3090"},
    "ray": {"model": "cogvlm-17b", "on": "2xrtx3090,ram=64GiB"},
    "transformers": {"model": "llava-onevision-7b", "on": "1xrtx4090"},
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


def again(service: Service) -> dict[str, Any]:
    """What the next start would plan with: the command's own answer, on the same machine."""
    return {word: service.argv[i + 1] for i, word in enumerate(service.argv) if word[:2] == "--"}


def test_the_command_asks_for_what_the_plan_promised_and_leaves_defaults_out() -> None:
    asked = again(service_of(plan_of("tp 4"), port=8000, host="0.0.0.0"))
    assert asked == {
        "--engine": "turbomind", "--tp": "4", "--replicas": "1", "--host": "0.0.0.0",
        "--port": "8000",
    }  # fmt: skip
    service = service_of(plan_of("promises"), port=8000, host="127.0.0.1")
    assert service.argv[:3] == ("turbofit", "serve", "Qwen/Qwen2-VL-7B-Instruct")
    assert again(service) == {
        "--engine": "turbomind", "--tp": "1", "--replicas": "1", "--images": "2",
        "--context": "8192", "--concurrency": "4", "--goal": "latency", "--max-pixels": "1003520",
        "--margin": str(1 << 30), "--host": "127.0.0.1", "--port": "8000",
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
    ("given", "words"),
    [
        ({"max_batch_size": 4}, "--max-batch-size 4"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"cache_max_entry_count": 0.5}, "--cache-max-entry-count 0.5"),
        ({"max_prefill_token_num": 4096}, "--max-prefill-token-num 4096"),
        ({"session_len": 4096}, "--session-len 4096"),
        ({"async_": 0}, "--async 0"),
        ({"margin": "2%"}, "--margin 2%"),
        ({"context": 4096}, "--context 4096"),
        ({"budget": "20GiB", "context": 4096}, f"--context 4096 --budget {20 << 30}"),
        ({"no_tuned": True}, "--no-tuned"),
        ({"image_size": (640, 480)}, "--image-size 640x480"),
        (
            {"engine": "pytorch", "eager_mode": False, "cudagraph_capture_batch_sizes": [1, 2]},
            "--no-eager-mode --cudagraph-capture-batch-sizes 1 2",
        ),
        ({"engine": "pytorch", "num_gpu_blocks": 500}, "--num-gpu-blocks 500"),
        ({"queue_images": True}, "--queue-images"),
        ({"queue_images": False}, "--no-queue-images"),
        ({"images": 0}, "--images 0"),
        ({"language_model_only": True}, "--language-model-only"),
        # A budget stays one, whatever else is on the cards then.
        ({"on": "rtx3090+l40s", "budget": "20GiB"}, f"--budget {20 << 30} --host"),
        (
            {"model": "qwen2-vl-7b", "on": "2xl4:free=10GiB", "engine": "transformers"},
            "--tp 2",
        ),
    ],
)
def test_what_was_set_is_set_at_the_next_start(given: dict[str, Any], words: str) -> None:
    plan = turbofit.api.plan(**{"model": "internvl2-8b", "on": "1xl40s", **given})
    saved = Plan.from_json(plan.to_json())
    assert saved == plan
    argv = " ".join(service_of(saved, port=1, host="127.0.0.1").argv)
    assert f" {words} " in argv
    assert "None" not in argv
    assert "queue" in words or "queue" not in argv


def test_what_a_prediction_has_is_what_starts(capsys: pytest.CaptureFixture[str]) -> None:
    made = turbofit.api.predict("internvl2-2b", on="1xrtx3090", context=4096)
    words = service_of(made, port=1, host="127.0.0.1").argv[2:]
    options = words[1 : words.index("--host")]
    assert main(["plan", words[0], *options, "--on", "1xrtx3090", "--json"]) == 0
    assert Plan.from_json(capsys.readouterr().out).settings == made.settings


def test_a_plan_that_does_not_say_what_was_asked_is_refused() -> None:
    plan = replace(plan_of("two copies"), options=UNSET)
    with pytest.raises(UsageError, match="with which options"):
        service_of(plan, port=1, host="127.0.0.1")


def test_no_option_of_a_file_names_another_model_or_machine() -> None:
    plan = plan_of("two copies")
    plan = replace(plan, options={"model": "x", "on": "1xl4", "gpus": "0"})
    argv = service_of(plan, port=1, host="127.0.0.1").argv
    assert argv[2] == "OpenGVLab/InternVL2-8B"
    assert not {"--on", "--gpus"} & {*argv}
    with pytest.raises(UsageError, match="bogus"):
        service_of(replace(plan, options={"bogus": 1}), port=1, host="127.0.0.1")


def test_a_checkpoint_of_the_hubs_cache_is_asked_for_by_its_name() -> None:
    plan = plan_of("two copies")
    found = "/data/a b/hub/models--OpenGVLab--InternVL2-8B/snapshots/0123abc"
    source = replace(plan.model.source, kind="hub_cache", checkpoint=found)
    service = service_of(
        replace(plan, model=replace(plan.model, source=source)), port=1, host="127.0.0.1"
    )
    assert service.argv[2] == "OpenGVLab/InternVL2-8B"
    assert service.folder is None  # its files are links that lead out of it
    assert 'Environment="HF_HUB_CACHE=/data/a b/hub"' in manifest(
        service, "systemd", executable="/usr/bin/turbofit"
    )


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
    for name in ("!!", "8b"):  # a Service of Kubernetes begins with a letter
        with pytest.raises(UsageError, match="begin with a letter"):
            service_of(plan, port=1, host="h", name=name)


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
    unit.write_text(manifest(service, "systemd", executable=executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, str(unit) in done.stderr) == (0, False), done.stderr
    assert ("CUDA_VISIBLE_DEVICES=GPU-0" in unit.read_text()) == real


def test_systemd_keeps_its_own_signs() -> None:
    plan = plan_of("two copies")
    odd = replace(service_of(plan, port=1, host="h"), argv=("turbofit", "serve", "/m/a b%c$d"))
    lines = manifest(odd, "systemd", executable="/usr/bin/turbofit").splitlines()
    assert 'ExecStart=/usr/bin/turbofit serve "/m/a b%%c$$d"' in lines
    assert "RestartPreventExitStatus=2 3 7" in lines  # no start helps against these


def test_no_name_of_a_folder_breaks_a_units_lines() -> None:
    odd = replace(
        service_of(plan_of("two copies"), port=1, host="h"),
        argv=("turbofit", "serve", "/m/a\\x41\n[Service]\nExecStartPre=/bin/false\\"),
    )
    text = manifest(odd, "systemd", executable="/usr/bin/turbofit")
    assert r'serve "/m/a\\x41\x0a[Service]\x0aExecStartPre=/bin/false\\"' in text
    assert text.count("\n[Service]\n") == 1
    assert not [line for line in text.splitlines() if line.endswith("\\")]


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
def test_compose_reads_the_file(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text(manifest(service, "compose", image="turbofit:test"))
    done = subprocess.run(
        ["docker-compose", "-f", str(path), "config"],
        env=os.environ | {"TURBOFIT_API_KEYS": "k"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_compose_publishes_on_loopback_and_names_the_cards() -> None:
    plan = plan_of("two copies")
    plan = replace(plan, machine=replace(plan.machine, source="nvml"))
    service = service_of(plan, port=23333, host="0.0.0.0")
    body = yaml.safe_load(manifest(service, "compose", image="i"))["services"][service.name]
    assert body["ports"] == ["127.0.0.1:23333:23333"]
    (device,) = body["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == [gpu.uuid for gpu in plan.gpus]
    assert "count" not in device
    assert body["environment"]["TURBOFIT_API_KEYS"].startswith("${TURBOFIT_API_KEYS:?")


def test_a_manifest_runs_turbofit_once_whatever_the_images_entrypoint_is() -> None:
    service = service_of(plan_of("two copies"), port=23333, host="0.0.0.0")
    body = yaml.safe_load(manifest(service, "compose", image="i"))["services"][service.name]
    assert body["entrypoint"] == list(service.argv)
    assert "command" not in body
    deployment, _ = yaml.safe_load_all(manifest(service, "k8s", image="i"))
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
    text = manifest(service, "k8s", image="turbofit:test", claim=claim)
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
    from turbofit.launch.engine.engine_client import Timing
    from turbofit.launch.serve import supervisor as serve

    service = service_of(plan_of("two copies"), port=1, host="h")
    assert service.start == Timing().start
    assert service.stop >= Timing().drain + serve._LAST_SECONDS


def test_a_folder_is_mounted_where_it_lies() -> None:
    plan = plan_of("two copies")
    source = replace(plan.model.source, kind="folder", checkpoint="/models/own")
    plan = replace(plan, model=replace(plan.model, source=source))
    service = service_of(plan, port=23333, host="0.0.0.0")
    body = yaml.safe_load(manifest(service, "compose", image="i"))["services"][service.name]
    own = {"type": "bind", "source": "/models/own", "target": "/models/own", "read_only": True}
    assert own in body["volumes"]
    deployment, _ = yaml.safe_load_all(manifest(service, "k8s", image="i"))
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"path": "/models/own", "type": "Directory"} in [v.get("hostPath") for v in volumes]


class TestCommand:
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

    def test_a_model_is_planned_and_kinds_have_other_names(self, saved: str, capsys) -> None:
        words = ["internvl2-8b", "--on", "1xrtx3090"]
        assert main(["export", "docker-compose", *words]) == 0
        found = yaml.safe_load(capsys.readouterr().out)["services"]["turbofit-internvl2-8b"]
        assert found["environment"]["HF_ENDPOINT"] is None  # the shell's, where it has one
        assert main(["export", "kubernetes", *words]) == 0
        assert "key: hf-token, optional: true" in capsys.readouterr().out
        assert main(["export", "service", *words]) == 0
        assert f"\nUser={getuser()}\n" in capsys.readouterr().out
        assert main(["export", "k8s", saved, "--on", "1xl4"]) == 2

    def test_a_container_has_no_user_s_name(self, saved: str, monkeypatch, capsys) -> None:
        monkeypatch.setattr("getpass.getuser", lambda: {}["no such uid"])
        assert main(["export", "compose", saved]) == 0
        assert "services:" in capsys.readouterr().out

    def test_as_json(self, saved: str, capsys) -> None:
        assert main(["export", "k8s", saved, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["gpus"] == 2
        assert told["argv"][0] == "turbofit"

    def test_a_containers_network_is_its_own(self, saved: str, capsys) -> None:
        assert main(["export", "compose", saved, "--host", "127.0.0.1"]) == 2
        assert "hint:" in capsys.readouterr().err

    def test_systemd_takes_absolute_paths_alone(self, saved: str, capsys) -> None:
        assert main(["export", "systemd", saved, "--executable", "bin/turbofit"]) == 2
        assert "no absolute path" in capsys.readouterr().err
