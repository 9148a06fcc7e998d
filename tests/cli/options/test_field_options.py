"""Options as fields, and those of several models."""

from __future__ import annotations

import io
import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from turbofit.cli.command import CliCommand
from turbofit.cli.main import main
from turbofit.cli.options.field_options import filled, options_of
from turbofit.core.errors import UsageError
from turbofit.core.validation import Metavar, Validated
from turbofit.serving.options import ServeOptions


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


def given(*words: str) -> Asked:
    command = CliCommand(lambda **_: 0, [*options_of(Asked, Asked.model_fields)])
    with command.make_context("turbofit", list(words)) as ctx:
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


def test_idle_is_a_time() -> None:
    assert filled(ServeOptions, {"idle": "10m"}).idle == 600
    for wrong in ("soon", "0"):
        with pytest.raises(UsageError):
            filled(ServeOptions, {"idle": wrong})


@pytest.mark.parametrize("beside", [{"no_gateway": True}, {"cluster": "ray"}])
def test_what_does_not_go_with_idle(beside: dict[str, Any]) -> None:
    ServeOptions(idle=5.0, plan="plan.json").refuse_alone()
    with pytest.raises(UsageError, match="do not go together"):
        ServeOptions(idle=5.0, **beside).refuse_alone()


def test_a_machine_comes_by_stdin(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"l4:used=2048MiB\n")))
    assert main(["plan", "qwen2-vl-2b", "--on", "-", "--json"]) == 0
    (gpu,) = json.loads(capsys.readouterr().out)["machine"]["gpus"]
    assert (gpu["name"], gpu["used"]) == ("NVIDIA L4", 2048 << 20)
