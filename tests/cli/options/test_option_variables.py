"""Every option has an environment variable, which stands between command line and profile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.core import ParameterSource

from turbofit.cli.command import CliCommand, Option
from turbofit.cli.command_group import COMMANDS, TURBOFIT
from turbofit.cli.main import main
from turbofit.cli.usage_errors import ROOT, variable
from turbofit.core.process.variable_names import VARIABLES, is_service_link, without_options
from turbofit.core.process.variables import variables

ROOM = Path(__file__).parents[3]
Out = pytest.CaptureFixture[str]


def command(name: str) -> CliCommand:
    found = TURBOFIT.get_command(click.Context(TURBOFIT), name)
    assert found is not None
    return found


def options() -> Iterator[tuple[str, Option]]:
    """Each option of each command, without the help page and the forms of the answer."""
    for name in COMMANDS:
        for one in command(name).params:
            if isinstance(one, Option) and one.expose_value is not False and not one.form:
                yield name, one


def sample(option: Option) -> str:
    """A value that click takes."""
    if option.is_flag or option.count or isinstance(option.type, click.types.IntParamType):
        return "1"
    if isinstance(option.type, click.Choice):
        return str(option.type.choices[0])
    return "7"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_takes_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, prefix = command(name), f"{ROOT}_{name.upper()}"
    mine = [one for other, one in options() if other == name]
    names = {variable(prefix, one) for one in mine}
    assert len(names) == len(mine)
    assert not names & VARIABLES
    for one in mine:
        with monkeypatch.context() as patch:
            patch.setenv(variable(prefix, one), sample(one))
            with click.Context(found, info_name=name, auto_envvar_prefix=prefix) as ctx:
                value, source = one.consume_value(ctx, {})
                one.type_cast_value(ctx, value)
        assert source is ParameterSource.ENVIRONMENT, one.opts
        assert value in (sample(one), [sample(one)]), one.opts


def planned(capsys: Out, *words: str) -> dict[str, object]:
    assert main(["plan", *words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_command_line_then_environment_then_profile_then_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text(
        "model: internvl2-8b\nmachine: {on: 4xrtx3090}\n"
        "workload: {images: 3, concurrency: 5}\nlimits: {max-dynamic-patch: 6}\n"
    )
    monkeypatch.setenv("TURBOFIT_PLAN_FILE", str(profile))
    monkeypatch.setenv("TURBOFIT_PLAN_IMAGES", "2")
    monkeypatch.setenv("TURBOFIT_PLAN_MAX_DYNAMIC_PATCH", "4")
    found = planned(capsys, "--max-dynamic-patch", "2")
    assert found["limits"]["max_dynamic_patch"] == 2  # the command line's
    assert found["workload"]["images"] == 2  # the environment's
    assert found["workload"]["concurrency"] == 5  # the profile's
    assert found["workload"]["goal"] == "throughput"  # the default
    assert found["machine"]["name"] == "4xrtx3090"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("TURBOFIT_PLAN_TP", " ")
    assert planned(capsys, "internvl2-8b", "--on", "4xrtx3090")["parallel"]["tp"] == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TURBOFIT_PLAN_TP", "two", "--tp is from TURBOFIT_PLAN_TP"),
        ("TURBOFIT_PLAN_TPP", "2", "did you mean TURBOFIT_PLAN_TP?"),
        ("TURBOFIT_PLN_TP", "2", "did you mean TURBOFIT_PLAN_TP?"),
        ("TURBOFIT_API_KYES", "k", "did you mean TURBOFIT_API_KEYS?"),
        ("TURBOFIT_SERV_GPUS", "0", "did you mean TURBOFIT_SERVE_GPUS?"),
        ("TURBOFIT_XYZZY", "0", "options are TURBOFIT_COMMAND_OPTION"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["plan", "internvl2-8b", "--on", "1xrtx3090"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert said in hint
    assert name in error + hint


def test_help_and_other_commands_do_not_mind(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("TURBOFIT_SERVE_NO_SUCH", "1")
    planned(capsys, "internvl2-8b", "--on", "1xrtx3090")
    assert main(["serve", "m", "--help"]) == 0
    assert main(["serve", "m"]) == 2
    assert "TURBOFIT_SERVE_NO_SUCH is neither" in capsys.readouterr().err


def test_the_environment_has_no_form_of_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setenv("TURBOFIT_PLAN_JSON", "true")
    assert main(["plan", "internvl2-8b", "--on", "1xrtx3090"]) == 2
    assert "TURBOFIT_PLAN_JSON is neither" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TURBOFIT_SERVE_PORT", "tcp://10.0.0.1:23333"),
        ("TURBOFIT_INTERNVL2_8B_SERVICE_HOST", "10.0.0.1"),
        ("TURBOFIT_INTERNVL2_8B_SERVICE_PORT_HTTP", "23333"),
        ("TURBOFIT_INTERNVL2_8B_PORT_23333_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_what_kubernetes_sets_for_a_service_is_not_ours(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    assert is_service_link(name, value)
    monkeypatch.setenv(name, value)
    assert main(["serve", "internvl2-8b", "--on", "1xrtx3090", "--dry-run"]) == 0
    assert "--server-port 23333" in capsys.readouterr().out
    assert not is_service_link("TURBOFIT_SERVE_PORT", "8080")


def test_a_turbofit_of_ours_gets_no_options() -> None:
    kept = {"PATH": "/bin", "TURBOFIT_LEASES": "/x", "TURBOFIT_REHEARSAL": "r"}
    assert without_options({**kept, "TURBOFIT_SERVE_TP": "4"}) == kept


def test_the_python_api_does_not_mind_options() -> None:
    assert not variables({"TURBOFIT_SERVE_API_KEY": "k", "TURBOFIT_BENCH_API_KEY": "k"}).api_key


@pytest.mark.parametrize("words", [["--help"], ["help"], ["version"], ["completion", "bash"]])
def test_who_wonders_is_answered_whatever_the_environment_says(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOFIT_XYZZY", "1")
    assert main(words) == 0


def test_help_is_no_variable(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("TURBOFIT_PLAN_HELP", "1")
    assert main(["plan", "internvl2-8b", "--on", "1xrtx3090"]) == 2
    assert "TURBOFIT_PLAN_HELP is neither" in capsys.readouterr().err
