"""A pace that is asked for: shapes that keep it by the forecast come first, and misses are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import UNSET

from turbofit import api
from turbofit.cli.main import main
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan
from turbofit.core.struct import to_builtins

MODEL, ON = "internvl2-8b", "4xrtx3090"


def plan(**asked: Any) -> Plan:
    return api.plan(MODEL, on=ON, **asked)


def said(made: Plan) -> str:
    """What the plan says of the pace; it stands nowhere else."""
    told = made.pace.text if made.pace else ""
    assert not [one for one in (*made.reasons, *made.warnings) if "by the forecast: " in one]
    return told


def test_without_a_pace_nothing_is_said_and_with_an_easy_one_nothing_moves() -> None:
    plain, easy = plan(), plan(rate=0.1, first_token=60.0)
    assert plain.pace is UNSET
    assert (easy.settings, easy.parallel) == (plain.settings, plain.parallel)
    assert easy.pace.kept
    assert said(easy) == (
        "kept by the forecast: 0.1 of 0.1 requests a second (no error is known); "
        "1.42 of 60 s to the first token (under: published ones of text models under load were 4 "
        "to 28 times as long)"
    )
    text = api.plan("qwen3-8b", on="1xrtx4090", rate=1.0, per_token=1.0)
    assert "1 of 1 requests a second (median error 4.5%); " in said(text)
    assert said(text).endswith("s a token (no error is known)")


def test_the_shape_that_keeps_it_wins() -> None:
    """A token comes soonest where all cards share the weights; copies serve the most requests."""
    assert plan().parallel.tp == 1
    quick = plan(rate=0.05, per_token=0.018)
    assert quick.parallel.tp > 1
    assert said(quick).startswith("kept")
    assert any("missed by" in one.why_not for one in quick.considered)


@pytest.mark.parametrize(
    "asked",
    [
        {"rate": 0.05, "per_token": 0.018},
        {"first_token": 2.0, "goal": "latency", "context": 8192},
    ],
)
def test_what_serve_is_told_gives_the_same_settings(asked: dict[str, Any], capsys) -> None:
    made = plan(**asked)
    words = made.serve.argv[2:]
    assert "--rate" not in words
    assert main(["plan", *words, "--on", ON, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == to_builtins(made.settings)


@pytest.mark.parametrize(
    ("asked", "missed"),
    [({"rate": 100.0}, "2.03 of 100 requests"), ({"rate": 1.0, "first_token": 0.1}, "of 0.1 s")],
)
def test_what_no_shape_keeps_is_told_with_by_how_much(asked, missed) -> None:
    made = plan(**asked)
    assert made.fits
    assert not made.pace.kept
    assert missed in said(made)
    assert said(made).endswith("; no shape that promises as much does better")


def test_a_higher_rate_never_has_a_sooner_first_token() -> None:
    told = [said(plan(rate=rate, first_token=1e3)) for rate in (0.1, 1.0, 1.8)]
    found = [float(why.partition(" of 1000 s")[0].rpartition(" ")[2]) for why in told]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_which_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["which", "--on", "1xl4", "--rate", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    slow = [one for one in document["others"] if "missed by" in one["why_not"]]
    assert slow
    assert all(one["requests_per_second"] < 2.001 for one in slow)
    assert all(one["requests_per_second"] > 1.999 for one in document["keep"])
    assert document["request"]["rate"] == 2.0
    assert any(one["why_not"] == "has no forecast of speed" for one in document["others"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", MODEL, "--on", ON, "--least"], "least decides by memory"),
        (["plan", MODEL, "--cluster", "sim:1xrtx3090@2"], "not for a cluster"),
        (["plan", MODEL, "qwen2-vl-2b", "--on", ON], "are for one model"),
    ],
)
def test_what_has_no_pace_refuses_one_or_says_so(words: list[str], said: str, capsys) -> None:
    assert main([*words, "--rate", "1"]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(UsageError, match="choose a shape"):
        api.predict(MODEL, on=ON, rate=1.0)
    made = api.plan("llava-onevision-7b", on="1xrtx3090", rate=1.0)
    assert any("decide nothing" in one for one in made.warnings)


@pytest.mark.parametrize(("rate", "word"), [("0.1", "kept by"), ("20", "missed by")])
def test_the_short_answer_says_it(rate: str, word: str, capsys) -> None:
    assert main(["plan", MODEL, "--on", ON, "--rate", rate]) == 0
    assert " ".join(capsys.readouterr().out.split()).count(word) == 1
