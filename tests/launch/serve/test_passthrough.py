"""What clients may ask of LMDeploy through turbofit: names of a model, and its own options."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import turbofit
from tests.support.plans import model
from turbofit.core.errors import UsageError
from turbofit.core.model import ModelSource
from turbofit.launch.serve.config import ServeConfig
from turbofit.launch.serve.passthrough import adapter_names, option_classes, sort_options


def test_every_name_that_people_know_it_by() -> None:
    plan = turbofit.plan("internvl2-2b", on="1xrtx3090")
    hub, last = "OpenGVLab/InternVL2-2B", "InternVL2-2B"
    assert ServeConfig().client_names(plan) == (hub, "internvl2-2b", last)
    mine = ServeConfig(model_name="mine").client_names(plan)
    assert mine == ("mine", "internvl2-2b", hub, last)
    names = ServeConfig(options=("--adapters", "sql=/lora")).names(plan)
    assert {*names.values()} == {hub, "sql"}
    assert (names["sql"], names["internvl2-2b"]) == ("sql", hub)
    # As a plan of an older turbofit has it, or one that a program made of a model.
    assert ServeConfig().client_names(replace(plan, serve=None)) == (hub, last, "internvl2-2b")
    aliased = turbofit.plan("internvl2 2b", on="1xrtx3090")
    assert "internvl2 2b" in ServeConfig().client_names(aliased)
    source = ModelSource(kind="folder", where="/m/My-VL", sizes="file", checkpoint="/m/My-VL")
    folder = turbofit.plan(model(name="My-VL", hub_id=None, source=source), on="1xa100-80g")
    assert ServeConfig().client_names(folder) == ("My-VL", "/m/My-VL")
    assert ServeConfig(model_name="x").client_names(folder) == ("x", "/m/My-VL", "My-VL")


def test_what_passes_and_what_is_planned_with() -> None:
    passed = sort_options(
        ["--api-keys", "a", "b", "--max-log-len=5", "--chat-t", "y", "--model-name", "x",
         "--quant-policy", "8", "--enable-prefix-caching", "--async=0"]
    )  # fmt: skip
    # Abbreviations mean what LMDeploy makes of them.
    assert passed.argv == ["--api-keys", "a", "b", "--max-log-len", "5", "--chat-template", "y"]
    assert passed.api_keys == ["a", "b"]
    assert passed.modelled == ["--quant-policy", "8", "--enable-prefix-caching", "--async", "0"]
    assert not passed.unplanned
    assert passed.model_name == "x"  # an option of serve itself


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], []),
        (["--adapters", "a=/x", "b=/y", "--log-level", "INFO"], ["a", "b"]),
        (["--adapters", "/x"], ["default"]),
    ],
)
def test_what_clients_call_adapters(argv: list[str], names: list[str]) -> None:
    """As LMDeploy 0.18 reads them: cli/utils.py, get_lora_adapters."""
    assert adapter_names(argv) == names


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--session-len", "4096"], "set by the plan", "before --"),
        (["--server-name", "0.0.0.0"], "set by turbofit", "leave it out"),
        (["--adapters", "a=b"], "does not model", "--unplanned"),
        (["--no-such-option"], "no option of LMDeploy", "--unplanned"),
        (["model"], "not an option", "before --"),
        (["--chat-template"], "needs a value", "VALUE"),
        (["--allow-origins", "--ssl"], "needs a value", "VALUE"),
        (["--cache-max", "0.5"], "set by the plan", "before --"),
        (["--allow", "x"], "could be", "write it out"),
    ],
)
def test_refusals(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        sort_options(words)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_what_passes_unplanned_is_said() -> None:
    words = ["--speculative-algorithm", "dflash", "--adapters", "a=b", "c=d"]
    with pytest.raises(UsageError, match="--speculative-algorithm after -- changes memory"):
        sort_options(words)
    words += ["--new", "1"]
    passed = sort_options(words, unplanned=True)
    assert passed.argv == words
    assert passed.unplanned == ["--speculative-algorithm", "--adapters", "--new"]
    with pytest.raises(UsageError, match="set by the plan"):  # which nothing contradicts
        sort_options(["--cache-max-entry-count", "0.9"], unplanned=True)


@given(st.lists(st.text(alphabet="-abcdept=0 ", max_size=8), max_size=5))
def test_words_of_any_kind(words: list[str]) -> None:
    with contextlib.suppress(UsageError):
        sort_options(words)


@pytest.mark.lmdeploy
def test_the_classes_cover_lmdeploys_parser() -> None:
    from lmdeploy.cli.serve import SubCliServe

    if "api_server" not in SubCliServe.subparsers.choices:
        SubCliServe.add_parsers()
    theirs = {
        option: 1 if action.nargs is None else action.nargs
        for action in SubCliServe.subparsers.choices["api_server"]._actions
        for option in action.option_strings
    }
    assert {name: option["values"] for name, option in option_classes().items()} == theirs
    kinds = {option["class"] for option in option_classes().values()}
    assert kinds == {"planned", "launcher", "modelled", "memory", "free"}
