"""Options as fields, and those of several models."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import pytest
from pydantic import Field

from turbofit.cli.command import CliCommand
from turbofit.cli.main import main
from turbofit.cli.options.common_options import filled, options_of
from turbofit.cli.options.launch_options import ModelsOptions, ServeOptions
from turbofit.core.errors import UsageError
from turbofit.core.validation import Metavar, Validated


class Asked(Validated):
    """One field of each kind."""

    count: Annotated[int, Field(ge=1), Metavar("N")] | None = Field(
        default=4, description="how many"
    )
    goal: Literal["speed", "memory"] | None = None
    sizes: tuple[Annotated[int, Metavar("BYTES")], ...] = ()
    keys: tuple[Annotated[str, Metavar("KEY", repeatable=True)], ...] = ()
    eager: bool = False
    seconds: float = 1.0


def reader() -> CliCommand:
    """A command with an option for each field."""
    return CliCommand(lambda **_: 0, [*options_of(Asked, Asked.model_fields)])


def given(*words: str) -> Asked:
    with reader().make_context("turbofit", list(words)) as ctx:
        return filled(Asked, ctx.params)


def test_fields_are_filled_and_what_is_not_given_is_not() -> None:
    words = "--count 2 --goal speed --sizes 1 2 --keys a --keys b --eager --seconds 0"
    assert given(*words.split()).given() == {
        "count": 2, "goal": "speed", "sizes": (1, 2), "keys": ("a", "b"), "eager": True,
        "seconds": 0.0,
    }  # fmt: skip
    assert given().given() == {}
    assert given().count == 4


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--count", "0"], "--count '0': it should be 1 or more", "--count: how many"),
        (["--count", "x"], "--count 'x': it should be a whole number", "--count: how many"),
        (["--goal", "sped"], "--goal 'sped': it should be", "did you mean speed?"),
        (["--sizes", "1", "x"], "--sizes 'x': it should be a whole number", "another --sizes"),
    ],
)
def test_a_wrong_value_is_named_with_its_option(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        given(*words)
    assert message in caught.value.message
    assert hint in caught.value.hint


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
