"""Commands over the real rooms below them, on preset machines."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.cli.command import CliCommand
from turbofit.cli.main import TURBOFIT, main
from turbofit.cli.options.common_options import (
    FORMS,
    machine_options,
    planning_keywords,
    planning_options,
)
from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan
from turbofit.planning.request import PlanRequest, PredictRequest

Out = pytest.CaptureFixture[str]


def test_plan_predict_and_report_agree(capsys: Out, tmp_path: Path) -> None:
    words = ["internvl2-8b", "--on", "4xrtx3090", "--tp", "4", "--json"]
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    plan = Plan.from_json(text)
    assert (plan.tp, plan.fits) == (4, True)
    saved = tmp_path / "plan.json"
    saved.write_text(text)
    assert main(["report", str(saved), "--json"]) == 0
    assert capsys.readouterr().out == text
    assert main(["report", str(saved)]) == 0
    assert plan.verdict.split(":")[0] in capsys.readouterr().out
    assert main(["report", str(saved), "--md"]) == 0
    assert capsys.readouterr().out.startswith("# ")
    assert main(["predict", *words]) in (0, 3)
    assert Plan.from_json(capsys.readouterr().out).considered == ()


def test_every_field_of_a_request_has_an_option() -> None:
    for name, kind in (("plan", PlanRequest), ("predict", PredictRequest)):
        command = TURBOFIT.get_command(click.Context(TURBOFIT), name)
        assert command is not None
        names = {{"async": "async_"}.get(one.name, one.name) for one in command.params}
        assert names - set(kind.model_fields) <= {
            "cluster", "file", "rehearse", "full", "as_json", "md", "quiet", "verbose",
            "help",
        }  # fmt: skip
        assert set(kind.model_fields) <= names


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        *((text, "cannot be read") for text in ("", "{}", "null", "\x00", "{" * 5000)),
        ('{"schema": "turbofit.plan/1"}', "cannot be read"),
        (replace(plausible_plan(), schema="turbofit.plan/9").to_json(), "turbofit.plan/9"),
    ],
    ids=range(7),
)
def test_what_is_no_plan(text: str, cause: str, tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert main(["report", str(path)]) == 2
    assert cause in capsys.readouterr().err
    assert main(["serve", "--plan", str(path)]) == 2


def test_dry_run_prints_what_would_be_launched(capsys: Out) -> None:
    words = ["serve", "internvl2-8b", "--on", "4xrtx3090", "--tp", "4", "--dry-run"]
    words = [*words, "--quant-policy", "8"]
    assert main([*words, "--port", "9000", "--", "--max-log-len", "9"]) == 0
    text = capsys.readouterr().out
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3" in text
    for option in ("--server-port 9000", "--quant-policy 8", "--max-log-len 9"):
        assert option in text
    assert main([*words, "--json"]) == 0
    assert Plan.from_json(capsys.readouterr().out).engines[0].command.argv[0] == "lmdeploy"
    assert main(["serve", "internvl2-26b", "--on", "1xrtx3060", "--dry-run"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quant-policy", "4", "--", "--quant-policy", "8"], "is set by turbofit"),
        (["--port", "65535", "--replicas", "2", "--tp", "1"], "beyond 65535"),
        (["--port", "70000"], "65535 or less"),
    ],
)
def test_serve_refuses(words: list[str], message: str, capsys: Out) -> None:
    assert main(["serve", "internvl2-8b", "--on", "2xrtx3090", "--dry-run", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_saved_plan_takes_nothing_beside_it_and_has_to_fit(tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plausible_plan().to_json())
    base = ["serve", "--plan", str(path), "--dry-run"]
    assert (main(base), main([*base, "--tp", "2"])) == (0, 2)
    assert (main(["serve", "model", *base[1:]]), main([*base, "--quant-policy", "8"])) == (2, 2)
    assert "--plan and --quant-policy do not go together" in capsys.readouterr().err
    path.write_text(plausible_plan(fits=False).to_json())
    assert main(["serve", "--plan", str(path)]) == 3
    told = capsys.readouterr().err
    assert "GPU 0 lacks 1.9 GiB" in told
    assert "--quant-policy 8: 1.94 times the tokens" in told


WORDS = """--tp 1 0 -1 1e9 --margin 3% nan% -5% 1GiB --image-size 1x1 9x --gpus , --context
--json --on --quant-policy int4 x --cache-max-entry-count nan inf 0.5 --budget é --async --goal"""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS.split()), max_size=6))
def test_any_words_are_options_or_wrong_use(given_words: list[str]) -> None:
    reader = CliCommand(lambda **_: 0, [*machine_options(), *planning_options(), *FORMS])
    hint = "none"
    try:
        with reader.make_context("plan", list(given_words)) as ctx:
            assert all(value == value for value in planning_keywords(ctx.params).values())
    except UsageError as exc:
        hint = exc.hint
    except click.exceptions.Exit:
        hint = "help"
    assert hint
