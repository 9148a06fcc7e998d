"""What an engine is started with: its command line and its environment."""

from __future__ import annotations

from itertools import pairwise

from tests.support.plans import plausible_plan
from turbofit.core.plan import Command
from turbofit.planning.commands import private_commands
from turbofit.serving.engine.launches import Launch, port_of


def test_ranks_start_a_ray_of_their_own_unless_somebody_names_one() -> None:
    """LMDeploy's would join a cluster that runs on the host, and take GPUs that no plan names."""
    launch = Launch(Command(env={}, argv=("lmdeploy",)), ())
    assert launch.environment({})["RAY_ADDRESS"] == "local"
    named = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert launch.environment(named)["RAY_ADDRESS"] == named["RAY_ADDRESS"]


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
