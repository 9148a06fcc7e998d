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
from msgspec import UNSET
from msgspec.structs import replace

import turbofit.api
from turbofit.cli.main import main
from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.core.plan import Plan
from turbofit.launch.engine.engine_client import Timing
from turbofit.launch.export import Service, manifest, service_of
from turbofit.launch.serve import supervisor

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


def service_at(plan: Plan, **given: Any) -> Service:
    return service_of(plan, **{"port": 1, "host": "127.0.0.1", **given})


def systemd(service: Service) -> str:
    return manifest(service, "systemd", executable="/usr/bin/turbofit")


def compose(service: Service) -> dict[str, Any]:
    text = manifest(service, "compose", image="i")
    body: dict[str, Any] = yaml.safe_load(text)["services"][service.name]
    return body


def pod(service: Service) -> dict[str, Any]:
    deployment, _ = yaml.safe_load_all(manifest(service, "k8s", image="i"))
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


@pytest.fixture(params=CASES)
def service(request: pytest.FixtureRequest) -> Service:
    return service_of(plan_of(request.param), port=23333, host="0.0.0.0")


def test_the_command_asks_for_what_the_plan_promised_and_printed() -> None:
    plan = plan_of("tp 4")
    argv = service_at(plan, port=8000, host="0.0.0.0").argv
    assert " ".join(argv[3:]) == (
        "--engine turbomind --tp 4 --replicas 1 --images 1 --context 32768 --max-dynamic-patch 12"
        " --host 0.0.0.0 --port 8000"
    )
    assert plan.serve is not None
    limits = plan.serve.argv[plan.serve.argv.index("--images") :]
    assert " ".join(limits) in " ".join(argv)
    # A plan of this machine, as it was measured, is left to what the next start measures.
    argv = service_at(measured(plan), port=8000, host="0.0.0.0").argv
    assert " ".join(argv[3:]) == (
        "--engine turbomind --tp 4 --replicas 1 --host 0.0.0.0 --port 8000"
    )
    argv = service_at(plan_of("promises"), port=8000).argv
    assert argv[:3] == ("turbofit", "serve", "Qwen/Qwen2-VL-7B-Instruct")
    assert dict(zip(argv[3::2], argv[4::2], strict=True)) == {
        "--engine": "turbomind", "--tp": "1", "--replicas": "1", "--images": "2",
        "--context": "8192", "--concurrency": "4", "--goal": "latency", "--max-pixels": "1003520",
        "--margin": str(1 << 30), "--host": "127.0.0.1", "--port": "8000",
    }  # fmt: skip


def measured(plan: Plan) -> Plan:
    """The plan as one of a machine that was measured."""
    return replace(plan, machine=replace(plan.machine, source="nvml"))


@pytest.mark.parametrize("case", [*CASES, "predicted"])
def test_the_next_start_plans_the_same(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "predicted":
        on = "1xrtx3090"
        plan = turbofit.api.predict("internvl2-2b", on=on, context=4096)
    else:
        plan, on = plan_of(case), CASES[case]["on"]
    words = service_at(plan).argv[2:]
    assert main(["plan", *words[: words.index("--host")], "--on", on, "--json"]) == 0
    next_plan = Plan.from_json(capsys.readouterr().out)
    assert next_plan.settings == plan.settings
    assert next_plan.parallel.groups == plan.parallel.groups
    if case != "predicted":
        assert next_plan.limits == plan.limits
        assert next_plan.by_group == plan.by_group


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cache_max_entry_count": 0.5}, "--cache-max-entry-count 0.5"),
        ({"async_": 0}, "--async 0"),
        ({"margin": "2%"}, "--margin 2%"),
        ({"budget": "20GiB", "context": 4096}, f"--max-dynamic-patch 12 --budget {20 << 30}"),
        ({"image_size": (640, 480)}, "--image-size 640x480"),
        (
            {"engine": "pytorch", "eager_mode": False, "cudagraph_capture_batch_sizes": [1, 2]},
            "--no-eager-mode --cudagraph-capture-batch-sizes 1 2",
        ),
        ({"queue_images": True}, "--queue-images"),
        ({"queue_images": False}, "--no-queue-images"),
        ({"images": 0}, "--images 0"),
        # A budget stays one, whatever else is on the cards then.
        ({"on": "rtx3090+l40s", "budget": "20GiB"}, f"--budget {20 << 30} --host"),
        ({"model": "qwen2-vl-7b", "on": "2xl4:free=10GiB", "engine": "transformers"}, "--tp 2"),
    ],
)
def test_what_was_set_is_set_at_the_next_start(given: dict[str, Any], words: str) -> None:
    plan = turbofit.api.plan(**{"model": "internvl2-8b", "on": "1xl40s", **given})
    saved = Plan.from_json(plan.to_json())
    assert saved == plan
    argv = " ".join(service_at(saved).argv)
    assert f" {words} " in argv
    assert "None" not in argv
    assert "queue" in words or "queue" not in argv


def test_what_is_not_exported() -> None:
    plan = plan_of("two copies")
    argv = service_at(replace(plan, options={"model": "x", "on": "1xl4", "gpus": "0"})).argv
    assert argv[2] == "OpenGVLab/InternVL2-8B"
    assert not {"--on", "--gpus"} & {*argv}
    assert service_at(plan).name == "turbofit-internvl2-8b"
    assert service_at(plan, name="My VLM!").name == "my-vlm"
    too_large = turbofit.api.plan("internvl2-26b-awq", on="1xrtx3060")
    for wrong, given, error, cause in (
        (replace(plan, options=UNSET), {}, UsageError, "with which options"),
        (replace(plan, options={"bogus": 1}), {}, UsageError, "bogus"),
        (plan, {"name": "!!"}, UsageError, "begin with a letter"),
        (plan, {"name": "8b"}, UsageError, "begin with a letter"),  # as a Service of Kubernetes
        (too_large, {}, DoesNotFitError, "does not serve"),
    ):
        with pytest.raises(error, match=cause):
            service_at(wrong, **given)


def test_a_checkpoint_of_the_hubs_cache_is_asked_for_by_its_name() -> None:
    plan = plan_of("two copies")
    found = "/data/a b/hub/models--OpenGVLab--InternVL2-8B/snapshots/0123abc"
    source = replace(plan.model.source, kind="hub_cache", checkpoint=found)
    service = service_at(replace(plan, model=replace(plan.model, source=source)))
    assert service.argv[2] == "OpenGVLab/InternVL2-8B"
    assert service.folder is None  # its files are links that lead out of it
    unit = manifest(service, "systemd", executable="/usr/bin/turbofit", user="ann")
    assert 'Environment="HF_HUB_CACHE=/data/a b/hub"' in unit
    # A user without a home cannot read it.
    assert "HF_HUB_CACHE" not in systemd(service)
    assert f"Environment=HF_HOME=/var/cache/{service.name}" in systemd(service)


def test_a_context_lowered_to_the_cache_is_left_to_the_next_start() -> None:
    plan = turbofit.api.plan("internvl2-8b", on="1xl4:free=19GiB")
    assert plan.settings.session_len < plan.model.text.max_position_embeddings
    assert "--context" not in service_at(measured(plan)).argv


def test_shared_memory_for_ranks_that_meet_there_and_deadlines_of_the_supervisor() -> None:
    service = service_at(plan_of("two copies"))
    assert service.shm == 0
    assert service_at(plan_of("tp 4")).shm == 1 << 30
    assert service_at(plan_of("ray")).shm == (1 << 30) + int(0.3 * (64 << 30))
    assert service.start == Timing().start
    assert service.stop >= Timing().drain + supervisor._LAST_SECONDS


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
    service = service_at(plan_of("two copies"))
    lines = systemd(replace(service, argv=("turbofit", "serve", "/m/a b%c$d"))).splitlines()
    assert 'ExecStart=/usr/bin/turbofit serve "/m/a b%%c$$d"' in lines
    assert "RestartPreventExitStatus=2 3 7" in lines  # no start helps against these
    # No name of a folder breaks a unit's lines.
    odd = "/m/a\\x41\n[Service]\nExecStartPre=/bin/false\\"
    text = systemd(replace(service, argv=("turbofit", "serve", odd)))
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
    body = compose(service_at(plan, port=23333, host="0.0.0.0"))
    assert body["ports"] == ["127.0.0.1:23333:23333"]
    (device,) = body["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == [gpu.uuid for gpu in plan.gpus]
    assert "count" not in device
    assert body["environment"]["TURBOFIT_API_KEYS"].startswith("${TURBOFIT_API_KEYS:?")


def test_a_manifest_runs_turbofit_once_whatever_the_images_entrypoint_is() -> None:
    service = service_at(plan_of("two copies"), host="0.0.0.0")
    body = compose(service)
    assert body["entrypoint"] == list(service.argv)
    assert "command" not in body
    assert body["environment"]["HF_HOME"] in [one.split(":")[1] for one in body["volumes"]]
    (container,) = pod(service)["containers"]
    assert container["command"] == list(service.argv)  # Kubernetes' word for an entry point
    home = next(one["value"] for one in container["env"] if one["name"] == "HF_HOME")
    assert home in [one["mountPath"] for one in container["volumeMounts"]]


def test_a_folder_is_mounted_where_it_lies() -> None:
    plan = plan_of("two copies")
    source = replace(plan.model.source, kind="folder", checkpoint="/models/own")
    plan = replace(plan, model=replace(plan.model, source=source))
    service = service_at(plan, host="0.0.0.0")
    own = {"type": "bind", "source": "/models/own", "target": "/models/own", "read_only": True}
    assert own in compose(service)["volumes"]
    paths = [volume.get("hostPath") for volume in pod(service)["volumes"]]
    assert {"path": "/models/own", "type": "Directory"} in paths


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


def test_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_of("two copies").to_json())

    def told(*words: str, code: int = 0) -> str:
        assert main(["export", *words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    saved, model = str(path), ["internvl2-8b", "--on", "1xrtx3090"]
    for kind, line in (
        ("systemd", "[Unit]"), ("compose", "services:"), ("k8s", "kind: Deployment")
    ):  # fmt: skip
        assert line in told(kind, saved).splitlines()
    found = yaml.safe_load(told("compose", *model))["services"]["turbofit-internvl2-8b"]
    assert found["environment"]["HF_ENDPOINT"] is None  # the shell's, where it has one
    assert "key: hf-token, optional: true" in told("k8s", *model)
    for who, sudo, user in (
        ("ann", None, "ann"), ("root", "ann", "ann"), ("root", None, "turbofit")
    ):  # fmt: skip
        monkeypatch.setattr("getpass.getuser", lambda who=who: who)
        monkeypatch.setenv("SUDO_USER", sudo or "root")
        assert f"\nUser={user}\n" in told("systemd", *model)
    document = json.loads(told("k8s", saved, "--json"))
    assert (document["gpus"], document["argv"][0]) == (2, "turbofit")
    told("k8s", saved, "--on", "1xl4", code=2)
    # A container's network is its own, and it has no user's name.
    assert "hint:" in told("compose", saved, "--host", "127.0.0.1", code=2)
    assert "no absolute path" in told("systemd", saved, "--executable", "bin/turbofit", code=2)
    monkeypatch.setattr("getpass.getuser", lambda: {}["no such uid"])
    assert "services:" in told("compose", saved)
