"""Each manifest is read by the checker of the tool that it is for."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from msgspec.structs import replace

import turbofit.api
from turbofit.cli.commands.export import manifest
from turbofit.cli.commands.serve import serve
from turbofit.cli.main import TURBOFIT, main
from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.core.plan import Plan, ServeCommand
from turbofit.serving import supervisor
from turbofit.serving.engine.engine_client import Timing

CASES: dict[str, dict[str, Any]] = {
    "two copies": {"model": "internvl2-8b", "on": "2xrtx4090"},
    "tp 4": {"model": "internvl2-8b", "on": "4xrtx3090", "tp": 4},
    "ray": {"model": "cogvlm-17b", "on": "2xrtx3090,ram=64GiB"},
    "promises": {
        "model": "qwen2-vl-7b", "on": "1xrtx3090", "max_pixels": 1003520, "images": 2,
        "context": 8192, "concurrency": 4, "goal": "latency", "margin": "1GiB",
    },
}  # fmt: skip


def plan_of(case: str) -> Plan:
    options = dict(CASES[case])
    return turbofit.api.plan(options.pop("model"), **options)


@pytest.fixture(params=CASES)
def plan(request: pytest.FixtureRequest) -> Plan:
    return plan_of(request.param)


def commanded(plan: Plan, *argv: str) -> Plan:
    return replace(plan, serve=ServeCommand(argv=argv))


def compose(plan: Plan) -> dict[str, Any]:
    body: dict[str, Any] = yaml.safe_load(manifest(plan, "compose", port=23333, name="vlm"))
    return body["services"]["vlm"]


def pod(plan: Plan) -> dict[str, Any]:
    deployment, _ = yaml.safe_load_all(manifest(plan, "k8s", port=23333))
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def test_the_command_is_the_plan_s(plan: Plan) -> None:
    assert plan.serve is not None
    words = [*plan.serve.argv, "--port", "23333"]
    inside = [*words, "--host", "0.0.0.0"]
    body, (container,) = compose(plan), pod(plan)["containers"]
    assert (
        body["entrypoint"] == container["command"] == inside
    )  # Kubernetes' word for an entry point
    assert "command" not in body
    (line,) = [
        line
        for line in manifest(plan, "systemd", port=23333).splitlines()
        if line.startswith("ExecStart=")
    ]
    assert line.split()[1:] == words[1:]
    for home, mounts in (
        (body["environment"]["HF_HOME"], [one.split(":")[1] for one in body["volumes"]]),
        (
            next(one["value"] for one in container["env"] if one["name"] == "HF_HOME"),
            [one["mountPath"] for one in container["volumeMounts"]],
        ),
    ):
        assert home in mounts


def test_a_container_has_cards_of_its_own_numbers() -> None:
    plan = commanded(plan_of("two copies"), "turbofit", "serve", "m", "--gpus", "2,3", "--tp", "2")
    assert compose(plan)["entrypoint"][:5] == ["turbofit", "serve", "m", "--tp", "2"]
    assert "serve m --gpus 2,3 --tp 2 --port 1\n" in manifest(plan, "systemd", port=1)


def test_numbers_of_the_plan_and_deadlines_of_the_supervisor(plan: Plan) -> None:
    body, spec = compose(plan), pod(plan)
    (container,), gpus = spec["containers"], plan.tp * plan.replicas
    (device,) = body["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    size = 1024 + (int(0.3 * (64 << 10)) + 1 if plan.backend.is_pytorch else 0)
    assert body["shm_size"] == f"{size}m"
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{size}Mi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    memory = container["resources"]["requests"]["memory"]
    assert (int(memory.removesuffix("Mi")) - 1) << 20 < plan.host.total <= int(memory[:-2]) << 20
    timing = Timing()
    probe, stop = container["startupProbe"], spec["terminationGracePeriodSeconds"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= timing.start
    assert {probe["httpGet"]["path"], container["readinessProbe"]["httpGet"]["path"]} == {"/health"}
    assert body["healthcheck"]["start_period"] == f"{timing.start:.0f}s"
    assert stop >= timing.drain + supervisor._LAST_SECONDS
    assert body["stop_grace_period"] == f"{stop}s"
    assert f"\nTimeoutStopSec={stop}\n" in manifest(plan, "systemd", port=1)
    assert spec["enableServiceLinks"] is False


def test_what_is_not_exported() -> None:
    plan = plan_of("two copies")
    assert "# Written" in manifest(plan, "systemd", port=1, name="My VLM!").splitlines()[0]
    assert "/my-vlm.env" in manifest(plan, "systemd", port=1, name="My VLM!")
    too_large = turbofit.api.plan("internvl2-26b-awq", on="1xrtx3060")
    for wrong, name, error, cause in (
        (plan, "!!", UsageError, "begin with a letter"),
        (plan, "8b", UsageError, "begin with a letter"),  # as a Service of Kubernetes
        (too_large, None, DoesNotFitError, "does not fit"),
    ):
        with pytest.raises(error, match=cause):
            manifest(wrong, "k8s", port=1, name=name)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_reads_the_unit(plan: Plan, tmp_path: Path, monkeypatch) -> None:
    program = shutil.which("true") or ""
    monkeypatch.setattr("turbofit.cli.commands.export.installed_program", lambda: program)
    unit = tmp_path / "vlm.service"
    unit.write_text(manifest(plan, "systemd", port=1, name="vlm"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, str(unit) in done.stderr) == (0, False), done.stderr


def test_systemd_keeps_its_own_signs(monkeypatch) -> None:
    program = "/usr/bin/turbofit"
    monkeypatch.setattr("turbofit.cli.commands.export.installed_program", lambda: program)
    plan = plan_of("two copies")
    text = manifest(commanded(plan, "turbofit", "serve", "/m/a b%c$d"), "systemd", port=1)
    lines = text.splitlines()
    assert 'ExecStart=/usr/bin/turbofit serve "/m/a b%%c$$d" --port 1' in lines
    assert "RestartPreventExitStatus=2 3 7" in lines  # no start helps against these
    # No name of a folder breaks a unit's lines.
    odd = "/m/a\\x41\n[Service]\nExecStartPre=/bin/false\\"
    named = replace(plan, model=replace(plan.model, name=odd))
    text = manifest(commanded(named, "turbofit", "serve", odd), "systemd", port=1, name="vlm")
    assert r'serve "/m/a\\x41\n[Service]\nExecStartPre=/bin/false\\"' in text
    assert text.count("\n[Service]\n") == 1
    assert not [line for line in text.splitlines() if line.endswith("\\")]


def test_compose_publishes_on_loopback_and_doubles_its_sign() -> None:
    body = compose(commanded(plan_of("two copies"), "turbofit", "serve", "/m/$x"))
    assert body["ports"] == ["127.0.0.1:23333:23333"]
    assert body["environment"]["TURBOFIT_API_KEYS"].startswith("${TURBOFIT_API_KEYS:?")
    assert body["environment"]["HF_ENDPOINT"] is None  # the shell's, where it has one
    assert body["entrypoint"][2] == "/m/$$x"


def test_kubernetes_reads_the_objects(plan: Plan) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    text = manifest(plan, "k8s", port=23333, image="turbofit:test")
    assert "&id" not in text
    deployment, front = yaml.safe_load_all(text)
    for one in (deployment, front):
        validate.validate(one, "1.30", strict=True)
    assert front["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    spec = deployment["spec"]["template"]["spec"]
    mounted = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == mounted


#: What GPUStack 2 takes of a custom backend's YAML, and of one of its versions.
#: Source: its gpustack/routes/inference_backend.py and schemas/inference_backend.py at 47277d79.
GPUSTACK_FIELDS = {
    "backend_name", "version_configs", "default_version", "default_backend_param",
    "default_run_command", "default_entrypoint", "health_check_path", "description", "default_env",
    "enabled", "backend_source", "parameter_format", "common_parameters",
}  # fmt: skip
GPUSTACK_VERSION_FIELDS = {"image_name", "run_command", "entrypoint", "custom_framework", "env"}


def gpustack_words(version: dict[str, str], folder: str) -> list[str]:
    """What GPUStack starts: it fills in first, and splits as a shell afterwards."""
    line = version["run_command"]
    filled_in = {"model_path": folder, "worker_ip": "10.0.0.7", "port": "40001", "model_name": "m"}
    for field, value in filled_in.items():
        line = line.replace("{{" + field + "}}", value)
    assert "{{" not in line
    return [*shlex.split(version["entrypoint"]), *shlex.split(line)]


def test_gpustack_reads_the_backend(plan: Plan) -> None:
    text = manifest(plan, "gpustack", port=23333, image="registry.example/turbofit:1")
    body = yaml.safe_load(text)
    assert body.keys() <= GPUSTACK_FIELDS
    assert body["backend_name"].endswith("-custom")
    version = body["version_configs"][body["default_version"]]
    assert version.keys() <= GPUSTACK_VERSION_FIELDS
    assert version["custom_framework"] == "cuda"
    assert version["image_name"] == "registry.example/turbofit:1"
    words = gpustack_words(version, "/var/lib/gpustack/cache/my model")
    assert plan.serve is not None
    given = list(plan.serve.argv[3:])  # none of these cases names GPUs
    assert words[:3] == ["turbofit", "serve", "/var/lib/gpustack/cache/my model"]
    assert words[3 : 3 + len(given)] == given
    with serve.make_context("serve", words[2:], parent=click.Context(TURBOFIT)) as read:
        assert read.params["no_auth"] is True


def test_gpustack_is_told_the_bytes_of_a_plan() -> None:
    plan = plan_of("tp 4")
    (claim,) = re.findall(r"GPUSTACK_MODEL_VRAM_CLAIM=(\d+)", manifest(plan, "gpustack", port=1))
    taken = sum(max(gpu.peak, gpu.load_peak) - gpu.used for gpu in plan.ledgers)
    margins = sum(gpu.margin for gpu in plan.ledgers)
    assert int(claim) == taken + margins
    assert int(claim) <= sum(gpu.total for gpu in plan.ledgers)


def test_the_command(tmp_path: Path, capsys) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_of("two copies").to_json())

    def told(*words: str, code: int = 0) -> str:
        assert main(["export", *words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    for kind, line in (
        ("systemd", "[Unit]"), ("compose", "services:"), ("k8s", "kind: Deployment")
    ):  # fmt: skip
        assert line in told(kind, str(path)).splitlines()
    found = yaml.safe_load(told("compose", "internvl2-8b", "--on", "1xrtx3090"))
    assert list(found["services"]) == ["turbofit-internvl2-8b"]
    assert "leave --on out" in told("k8s", str(path), "--on", "1xl4", code=2)
    words = ("internvl2-8b", "--on", "4xrtx3090", "--tp", "2", "--images", "2")
    (service,) = yaml.safe_load(told("compose", *words))["services"].values()
    assert " --tp 2 " in f"{shlex.join(service['entrypoint'])} "
