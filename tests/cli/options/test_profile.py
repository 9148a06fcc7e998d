"""The profile, and the options that it may set."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from turbofit.cli.command_group import TURBOFIT
from turbofit.cli.main import main
from turbofit.cli.options.profile import Profile, read_profile, secret_of
from turbofit.cli.options.profile_option import defaults, read_again, sections
from turbofit.core.errors import UsageError
from turbofit.planning.request import PACE, PlanRequest

GOOD = """\
model: internvl2-8b
machine:
  on: 4xrtx3090
workload:
  images: 2
  context: 8k
  queue_images: no
settings:
  max-prefill-token-num: 4096
  async: 0
  cudagraph_capture_batch_sizes: [1, 2]
serve:
gateway:
  port: 8000
  api_key: env:CHAT_KEY
  allowed_media_domains: example.com
"""


def profile(tmp_path: Path, text: str) -> Profile:
    file = tmp_path / "turbofit.yaml"
    file.write_text(text)
    return read_profile(file, sections())


def test_values_are_as_a_command_line_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAT_KEY", "secret")
    values = defaults(profile(tmp_path, GOOD))
    assert values.pop("api_key")() == ("secret",)
    assert values == {
        "model": "internvl2-8b", "on": "4xrtx3090", "images": 2, "context": 8192,
        "queue_images": False, "max_prefill_token_num": 4096, "async_": 0,
        "cudagraph_capture_batch_sizes": (1, 2), "port": 8000,
        "allowed_media_domains": ("example.com",),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("context: 8k", "contxt: 8k", "contxt is nothing that workload knows", "context?"),
        ("images: 2", "images: two", "workload.images 'two': it should be a whole", "images a"),
        ("images: 2", "images: true", "workload.images 'true'", "images a request"),
        ("images: 2", "images: {a: 1}", "workload.images should be a value", "images: VALUE"),
        ("env:CHAT_KEY", "s3cret", "gateway.api_key should refer to a key", "env:NAME"),
        ("  port: 8000", "  context: 8000", "context does not belong to gateway", "workload:"),
        ("gateway:", "gatway:", "gatway is nothing that a profile knows", "gateway?"),
        (
            "gateway:",
            "context: 8k\ngateway:",
            "context does not belong to a profile",
            "below workload",
        ),
        ("gateway:", "zzz:", "zzz is nothing that", "it knows model, machine"),
        (
            "queue_images: no",
            "images: 3",
            "line 5: no YAML: images stands twice",
            "docs/environment.md",
        ),
        ("serve:", "serve: 7", "serve should be keys with values", "key: value"),
        ("model: internvl2-8b", "models: [a]", "models is nothing that a profile", "model?"),
        ("port: 8000", "port: 99999", "gateway.port '99999': it should be 65535", "where"),
        ("model: internvl2-8b", "model: [a]", "model ('a',): it should be a text", "a folder"),
        ("on: 4xrtx3090", "on: [", "no YAML", "docs/environment.md"),
    ],
)
def test_an_error_has_its_key_and_what_would_be_right(tmp_path, old, new, message, hint):
    with pytest.raises(UsageError) as caught:
        profile(tmp_path, GOOD.replace(old, new, 1))
    assert "turbofit.yaml: " in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["", "- a", "just words", "\x00", "a: &a [*a]", "? [1]\n: 2"])
def test_what_is_no_profile(tmp_path, text):
    with pytest.raises(UsageError):
        profile(tmp_path, text)


def test_keys_from_files_are_looked_for_beside_the_profile(tmp_path):
    (tmp_path / "key").write_text("abc\n")
    assert secret_of("file:key", tmp_path, "p:1") == "abc"
    (tmp_path / "lines").write_text("abc\ndef\n")
    for reference, cause in (
        ("file:lines", "p:1: file:lines has several lines"),
        ("file:none", "cannot be read"),
        ("file:~no-such-user/key", "p:1: .*~no-such-user/key cannot be read, or holds"),
        ("env:TURBOFIT_TEST_NONE", "the environment has no TURBOFIT_TEST_NONE"),
    ):
        with pytest.raises(UsageError, match=cause):
            secret_of(reference, tmp_path, "p:1")


def test_keys_of_the_environment_come_before_the_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBOFIT_API_KEYS", "other")
    assert "api_key" not in defaults(profile(tmp_path, GOOD))


PROFILE = """\
model: internvl2-2b
machine: {on: 1xrtx3090}
workload: {context: 4096, concurrency: 3}
limits: {least: true}
gateway: {port: 8123, host: 127.0.0.1}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    return path


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_serves_a_profile(file, capsys):
    assert main(["serve", "--dry-run", "-f", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "--session-len 4096" in shown
    assert "--server-port 8123" in shown
    plan = json.dumps(planned(capsys, "plan", "-f", str(file)))
    file.with_name("plan.json").write_text(plan)
    assert main(["export", "systemd", "plan.json", "--port", "8123"]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("--context 4096", "--least", "--port 8123"))
    assert main(["export", "systemd"]) == 2


def test_everything_of_a_request_has_its_place():
    """But the pace and a release, which `plan` alone is asked for, and `which` for the pace."""
    held = [name for one in sections().values() if one.kind is PlanRequest for name in one.fields]
    assert sorted([*held, *PACE, "lmdeploy"]) == sorted(PlanRequest.model_fields)


def test_serve_measures_the_gpus_here_and_reads_its_profile_again(file):
    command = TURBOFIT.get_command(click.Context(TURBOFIT), "serve")
    for words, on in (([], None), (["--pretend"], "1xrtx3090"), (["--dry-run"], "1xrtx3090")):
        with command.make_context("serve", ["-f", str(file), *words]) as ctx:
            assert ctx.params["on"] == on
    with command.make_context("serve", ["-f", str(file), "--images", "2"]) as ctx:
        before = dict(ctx.params)
        file.write_text(PROFILE.replace("4096", "2048").replace("images", "img"))
        after = read_again(ctx)
    assert {name for name in after if after[name] != before[name]} == {"context"}
    assert after["images"] == "2"
