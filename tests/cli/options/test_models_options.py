"""The command line of models that sleep, share or take turns."""

from __future__ import annotations

import json

import pytest

from turbofit.cli.main import main
from turbofit.cli.options.common_options import filled
from turbofit.cli.options.launch_options import ModelsOptions, ServeOptions
from turbofit.core.errors import UsageError


def test_times_and_answers() -> None:
    options = filled(ModelsOptions, {"idle": "10m", "turn": "5s"})
    assert options.idle == 600
    assert options.policy_fields() == {"idle": 600.0, "turn": 5.0}
    assert options.wait_seconds == 600
    assert filled(ModelsOptions, {"wait": "2m"}).wait_seconds == 120
    assert filled(ModelsOptions, {"idle_answer": "503"}).wait_seconds == 0
    for wrong in ({"idle": "soon"}, {"idle": "0"}, {"idle_answer": "504"}):
        with pytest.raises(UsageError):
            filled(ModelsOptions, wrong)


def test_what_does_not_go_together() -> None:
    with pytest.raises(UsageError, match="--swap needs two models"):
        ModelsOptions(swap=True).check(("a",), ServeOptions())
    with pytest.raises(UsageError, match="--wait and --idle-answer"):
        ModelsOptions(wait=5.0).check(("a",), ServeOptions())
    for options in (ServeOptions(no_gateway=True), ServeOptions(cluster="ray")):
        with pytest.raises(UsageError, match="do not go together"):
            ModelsOptions(idle=5.0).check(("a",), options)
        with pytest.raises(UsageError, match="do not go together"):
            ModelsOptions().check(("a", "b"), options)
    ModelsOptions(idle=5.0).check(("a",), ServeOptions(plan="plan.json"))
    with pytest.raises(UsageError, match="do not go together"):
        ModelsOptions().check(("a", "b"), ServeOptions(plan="plan.json"))


def test_plan_of_several_models(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "internvl2-1b", "internvl2-2b", "--on", "1xrtx3090"]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [plan["model"]["name"] for plan in document["plans"]] == ["InternVL2-1B", "InternVL2-2B"]
    assert main([*words, "--rehearse"]) == 2
    assert "--rehearse and several models do not go together" in capsys.readouterr().err
    assert main(["plan", "internvl2-8b", "qwen2-vl-7b", "--on", "1xrtx3090"]) == 3
    assert "do not fit together" in capsys.readouterr().out
