"""Options that nobody types: environment variables, and a file of options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.core import ParameterSource

from turbofit.cli.command import Option
from turbofit.cli.main import TURBOFIT, main
from turbofit.cli.manual import COMMANDS
from turbofit.cli.options.untyped import ROOT, read_again, read_file, variables_of
from turbofit.core.errors import UsageError
from turbofit.core.process.variables import VARIABLES, is_service_link, without_options

PLAN = ["plan", "internvl2-8b", "--on", "1xrtx3090"]


def sample(option: Option) -> str:
    """A value that click takes."""
    if isinstance(option.type, click.IntRange) and option.type.min is not None:
        return str(option.type.min)
    if option.is_flag or option.count or isinstance(option.type, click.types.IntParamType):
        return "1"
    return str(option.type.choices[0]) if isinstance(option.type, click.Choice) else "7"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_takes_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, prefix = TURBOFIT.get_command(click.Context(TURBOFIT), name), f"{ROOT}_{name.upper()}"
    options = [one for one in command.params if isinstance(one, Option)]
    options = [one for one in options if one.expose_value is not False and not one.form]
    names = {f"{prefix}_{one.name.upper()}": one for one in options}
    assert len(names) == len(options)
    assert names.keys() <= {*variables_of(command, prefix)}
    assert not names.keys() & VARIABLES
    for variable, one in names.items():
        assert f"--{one.name.replace('_', '-')}" in one.opts  # as people look for it
        with monkeypatch.context() as patch:
            patch.setenv(variable, sample(one))
            with click.Context(command, info_name=name, auto_envvar_prefix=prefix) as ctx:
                value, source = one.consume_value(ctx, {})
                one.type_cast_value(ctx, value)
        assert source is ParameterSource.ENVIRONMENT, one.opts
        assert value in (sample(one), [sample(one)]), one.opts


def test_command_line_then_environment_then_file_then_default(
    tmp_path, monkeypatch, capsys
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "model: internvl2-8b\non: 4xrtx3090\nimages: 3\nconcurrency: 5\nmax-dynamic-patch: 6\n"
    )
    monkeypatch.setenv("TURBOFIT_PLAN_FILE", str(file))
    monkeypatch.setenv("TURBOFIT_PLAN_IMAGES", "2")
    monkeypatch.setenv("TURBOFIT_PLAN_MAX_DYNAMIC_PATCH", "4")
    monkeypatch.setenv("TURBOFIT_PLAN_TP", "")  # which is not set
    assert main(["plan", "--max-dynamic-patch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["promise"]["limits"]["max_dynamic_patch"] == 2  # the command line's
    assert found["workload"]["images"] == 2  # the environment's
    assert found["workload"]["concurrency"] == 5  # the file's
    assert found["workload"]["goal"] == "throughput"  # the default
    assert found["machine"]["name"] == "4xrtx3090"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TURBOFIT_PLAN_TP", "two", "--tp is from TURBOFIT_PLAN_TP"),
        ("TURBOFIT_PLAN_QUIET", "maybe", "(--quiet is from TURBOFIT_PLAN_QUIET)"),
        ("TURBOFIT_PLAN_TPP", "2", "did you mean TURBOFIT_PLAN_TP?"),
        ("TURBOFIT_ON", "3090", "did you mean TURBOFIT_PLAN_ON?"),
        ("TURBOFIT_PLN_TP", "2", "did you mean TURBOFIT_PLAN_TP?"),
        ("TURBOFIT_APIKEY", "k", "did you mean TURBOFIT_API_KEY?"),
        ("TURBOFIT_api_keys", "k", "did you mean TURBOFIT_API_KEYS?"),
        ("TURBOFIT_API_KYES", "k", "did you mean TURBOFIT_API_KEYS?"),
        ("TURBOFIT_SERV_GPUS", "0", "did you mean TURBOFIT_SERVE_GPUS?"),
        ("TURBOFIT_XYZZY", "0", "options are TURBOFIT_COMMAND_OPTION"),
        ("TURBOFIT_PLAN_MAX_MODEL_LEN", "8192", "of vLLM; here: TURBOFIT_PLAN_CONTEXT"),
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
    assert (main(PLAN), main(["serve", "m", "--help"]), main(["serve", "m"])) == (0, 0, 2)
    assert "TURBOFIT_SERVE_NO_SUCH is neither" in capsys.readouterr().err
    monkeypatch.setenv("TURBOFIT_XYZZY", "1")
    for words in (["--help"], [], ["--version"], ["completion", "bash"]):
        assert main(words) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TURBOFIT_SERVE_PORT", "tcp://10.0.0.1:23333"),
        ("TURBOFIT_SERVE_TP", "tcp://10.0.0.1:23333"),
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


GOOD = """\
model: internvl2-8b
on: 4xrtx3090
images: 2
context: 8k
queue_images: no
max-prefill-token-num: 4096
async: 0
cudagraph_capture_batch_sizes: [1, 2]
lmdeploy: 0.18
port: 8000
api_key_file: keys
drain:
allowed_media_domains: example.com
"""


def serving(*words: str) -> click.Context:
    group = click.Context(TURBOFIT, info_name="turbofit")
    return TURBOFIT.get_command(group, "serve").make_context("serve", list(words), parent=group)


def given(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "turbofit.yaml"
    file.write_text(text)
    return read_file(file, click.Context(TURBOFIT))


def test_values_of_a_file_are_as_a_command_line_has_them(tmp_path: Path) -> None:
    """The file may have options of `plan`, too, such as ``lmdeploy``."""
    assert given(tmp_path, GOOD) == {
        "model": "internvl2-8b", "on": "4xrtx3090", "images": "2", "context": "8k",
        "queue_images": "no", "max_prefill_token_num": "4096", "async": "0", "lmdeploy": "0.18",
        "cudagraph_capture_batch_sizes": ["1", "2"], "port": "8000", "api_key_file": "keys",
        "allowed_media_domains": ["example.com"],
    }  # fmt: skip
    with serving("-f", str(tmp_path / "turbofit.yaml"), "--dry-run") as ctx:
        assert ctx.params["queue_images"] is False
        assert ctx.params["allowed_media_domains"] == ("example.com",)
        assert ctx.params["async"] == "0"


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("context: 8k", "contxt: 8k", "contxt is no option of plan or serve", "mean context?"),
        ("context: 8k", "zzz: 8k", "zzz is no option", "a-file-of-options"),
        ("context: 8k", "max_model_len: 8k", "max_model_len is no option", "here: context"),
        ("images: 2", "images: {a: 1}", "images should be a value", "images: VALUE"),
        ("api_key_file: keys", "api-key: s3cret", "api-key is a secret", "api_key_file: FILE"),
        ("lmdeploy: 0.18", "images: 3", "images stands twice", "images: VALUE"),
        ("on: 4xrtx3090", "on: [", "line 4: no YAML", "docs/environment.md"),
    ],
)
def test_an_error_has_its_key_and_what_would_be_right(tmp_path, old, new, message, hint) -> None:
    with pytest.raises(UsageError) as caught:
        given(tmp_path, GOOD.replace(old, new, 1))
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["", "- a", "just words", "\x00", "? [1]\n: 2", "a: &a [*a]"])
def test_what_is_no_file_of_options(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError):
        given(tmp_path, text)


def test_a_wrong_value_names_the_file(tmp_path: Path, capsys) -> None:
    file = tmp_path / "turbofit.yaml"
    file.write_text("images: two\n")
    assert main([*PLAN, "-f", str(file)]) == 2
    told = capsys.readouterr().err
    assert "--images 'two': it should be a whole number" in told
    assert f"(--images is from {file})" in told
    assert main(["plan", "m", "-f", str(tmp_path / "none")]) == 2
    assert "none: it cannot be read" in capsys.readouterr().err


def test_a_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "turbofit.yaml"
    file.write_text("model: internvl2-2b\ncontext: 4096\nimages: 1\n")
    with serving("-f", str(file), "--images", "2") as ctx:
        before = dict(ctx.params)
        file.write_text("model: internvl2-2b\ncontext: 2048\nimages: 3\n")
        after = read_again(ctx)
    assert {name for name in after if after[name] != before[name]} == {"context"}
    assert after["images"] == "2"
