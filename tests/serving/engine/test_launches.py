"""What an engine is started with: its command line and its environment."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

from tests.support.plans import plausible_plan
from turbofit.core.plan import Command
from turbofit.planning.commands import private_commands
from turbofit.serving.engine.launches import KEY, Launch, port_of
from turbofit.serving.engine.lmdeploy import module_runner


def run_module(folder: Path, name: str, code: str, **environ: str) -> list[str]:
    """What a module says, as LMDeploy's is run."""
    (folder / f"{name}.py").write_text(code)
    command = Command(env=environ, argv=("lmdeploy", "serve", "--server-port", "7"))
    start = Launch(command, module_runner(name), "secret").start_command(0)
    assert "secret" not in " ".join(start.argv)
    done = subprocess.run(
        start.argv, env={**start.env, "PYTHONPATH": str(folder)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_what_an_engine_sees(tmp_path: Path) -> None:
    """Its key, which stands in no command line and is not handed on to what the engine starts."""
    code = "import os, sys\nprint(*sys.argv[1:], os.getenv('TURBOFIT_ENGINE_KEY'), os.getenv('A'))"
    (words,) = run_module(tmp_path, "dumps", code, A="1")
    assert words == "serve --server-port 7 --api-keys secret None 1"
    # One of the user's own is on the command line already.
    command = Command(env={}, argv=("lmdeploy", "--api-keys", "mine"))
    assert KEY not in Launch(command, module_runner("x"), "mine").start_command(0).env
    # A script's folder comes first on its path; ours has a module named like many others.
    path = run_module(tmp_path, "looks", "import sys\nprint('\\n'.join(sys.path))\n")
    assert not any(folder.endswith("turbofit/serving") for folder in path)


def test_ranks_start_a_ray_of_their_own_unless_somebody_names_one() -> None:
    """LMDeploy's would join a cluster that runs on the host, and take GPUs that no plan names."""
    launch = Launch(Command(env={}, argv=("lmdeploy",)), ())
    assert launch.environment({})["RAY_ADDRESS"] == "local"
    named = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert launch.environment(named)["RAY_ADDRESS"] == named["RAY_ADDRESS"]


def test_an_engine_keeps_no_urls(tmp_path: Path) -> None:
    """LMDeploy parses each image's data: URL, and Python kept the last 128 of them twice."""
    code = (
        "from urllib.parse import urlparse, urlsplit\n"
        "print(urlparse('data:image/png;base64,AAAA').path)\n"
        "print(urlsplit.cache_info().currsize)\n"
    )
    assert run_module(tmp_path, "parses", code) == ["image/png;base64,AAAA", "0"]


def test_private_commands_are_closed() -> None:
    plan = plausible_plan(gpus=2, tp=1)
    commands = private_commands(plan, [5001, 5002], "/overlay/InternVL2-8B", "org/name")
    assert [port_of(command) for command in commands] == [5001, 5002]
    argv = commands[0].argv
    assert port_of(Command(env={}, argv=("lmdeploy",))) == 23333
    assert argv[3] == "/overlay/InternVL2-8B"
    values = dict(pairwise(argv))
    assert (values["--model-name"], values["--server-name"]) == ("org/name", "127.0.0.1")
    assert "--disable-fastapi-docs" in argv
    assert values["--allow-origins"] == "https://closed.invalid"
