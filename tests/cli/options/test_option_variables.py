"""Every option has an environment variable, which stands between command line and profile."""

from __future__ import annotations

import json

import click
import pytest
from click.core import ParameterSource

from turbofit.cli.command import Option
from turbofit.cli.command_group import COMMANDS, TURBOFIT
from turbofit.cli.main import main
from turbofit.cli.options.option_variables import ROOT, variable
from turbofit.core.process.variable_names import VARIABLES, is_service_link, without_options
from turbofit.core.process.variables import variables

PLAN = ["plan", "internvl2-8b", "--on", "1xrtx3090"]


def sample(option: Option) -> str:
    """A value that click takes."""
    if option.is_flag or option.count or isinstance(option.type, click.types.IntParamType):
        return "1"
    if isinstance(option.type, click.Choice):
        return str(option.type.choices[0])
    return "7"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_takes_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, prefix = TURBOFIT.get_command(click.Context(TURBOFIT), name), f"{ROOT}_{name.upper()}"
    options = [one for one in command.params if isinstance(one, Option)]
    options = [one for one in options if one.expose_value is not False and not one.form]
    names = {variable(prefix, one) for one in options}
    assert len(names) == len(options)
    assert not names & VARIABLES
    for one in options:
        with monkeypatch.context() as patch:
            patch.setenv(variable(prefix, one), sample(one))
            with click.Context(command, info_name=name, auto_envvar_prefix=prefix) as ctx:
                value, source = one.consume_value(ctx, {})
                one.type_cast_value(ctx, value)
        assert source is ParameterSource.ENVIRONMENT, one.opts
        assert value in (sample(one), [sample(one)]), one.opts


def test_command_line_then_environment_then_profile_then_default(
    tmp_path, monkeypatch, capsys
) -> None:
    profile = tmp_path / "p.yaml"
    profile.write_text(
        "model: internvl2-8b\nmachine: {on: 4xrtx3090}\n"
        "workload: {images: 3, concurrency: 5}\nlimits: {max-dynamic-patch: 6}\n"
    )
    monkeypatch.setenv("TURBOFIT_PLAN_FILE", str(profile))
    monkeypatch.setenv("TURBOFIT_PLAN_IMAGES", "2")
    monkeypatch.setenv("TURBOFIT_PLAN_MAX_DYNAMIC_PATCH", "4")
    monkeypatch.setenv("TURBOFIT_PLAN_TP", " ")  # which is not set
    assert main(["plan", "--max-dynamic-patch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limits"]["max_dynamic_patch"] == 2  # the command line's
    assert found["workload"]["images"] == 2  # the environment's
    assert found["workload"]["concurrency"] == 5  # the profile's
    assert found["workload"]["goal"] == "throughput"  # the default
    assert found["machine"]["name"] == "4xrtx3090"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TURBOFIT_PLAN_TP", "two", "--tp is from TURBOFIT_PLAN_TP"),
        ("TURBOFIT_PLAN_QUIET", "maybe", "give 1 for yes, 0 for no (--quiet is from"),
        ("TURBOFIT_PLAN_TPP", "2", "did you mean TURBOFIT_PLAN_TP?"),
        ("TURBOFIT_PLN_TP", "2", "did you mean TURBOFIT_PLAN_TP?"),
        ("TURBOFIT_API_KYES", "k", "did you mean TURBOFIT_API_KEYS?"),
        ("TURBOFIT_SERV_GPUS", "0", "did you mean TURBOFIT_SERVE_GPUS?"),
        ("TURBOFIT_XYZZY", "0", "options are TURBOFIT_COMMAND_OPTION"),
        ("TURBOFIT_PLAN_MAX_MODEL_LEN", "8192", "of vLLM; here: TURBOFIT_PLAN_CONTEXT=8192"),
        ("TURBOFIT_PLAN_HELP", "1", "TURBOFIT_PLAN_HELP is neither"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, value: str, said: str, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert main(PLAN) == 2
    told = capsys.readouterr().err
    assert said in told
    assert name in told
    assert len(told.splitlines()) == 2


def test_help_and_other_commands_do_not_mind(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TURBOFIT_SERVE_NO_SUCH", "1")
    assert main(PLAN) == 0
    assert main(["serve", "m", "--help"]) == 0
    assert main(["serve", "m"]) == 2
    assert "TURBOFIT_SERVE_NO_SUCH is neither" in capsys.readouterr().err
    monkeypatch.setenv("TURBOFIT_XYZZY", "1")
    for words in (["--help"], [], ["--version"], ["completion", "bash"]):
        assert main(words) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TURBOFIT_SERVE_PORT", "tcp://10.0.0.1:23333"),
        ("TURBOFIT_INTERNVL2_8B_SERVICE_PORT_HTTP", "23333"),
        ("TURBOFIT_INTERNVL2_8B_PORT_23333_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_what_kubernetes_sets_for_a_service_is_not_ours(name, value, monkeypatch, capsys) -> None:
    assert is_service_link(name, value)
    monkeypatch.setenv(name, value)
    assert main(["serve", *PLAN[1:], "--dry-run"]) == 0
    assert "--server-port 23333" in capsys.readouterr().out
    assert not is_service_link("TURBOFIT_SERVE_PORT", "8080")


def test_a_turbofit_of_ours_and_the_python_api_get_no_options() -> None:
    kept = {"PATH": "/bin", "TURBOFIT_LEASES": "/x", "TURBOFIT_REHEARSAL": "r"}
    assert without_options({**kept, "TURBOFIT_SERVE_TP": "4"}) == kept
    assert not variables({"TURBOFIT_SERVE_API_KEY": "k", "TURBOFIT_BENCH_API_KEY": "k"}).api_key
