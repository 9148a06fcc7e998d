"""What `serve` refuses before it does anything, and what its gateway is told."""

from __future__ import annotations

import traceback
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

import turbofit
from tests.support.processes import sharing_libraries
from turbofit.cli.commands import serve
from turbofit.cli.main import main
from turbofit.core.version import REFERENCE
from turbofit.serving import run
from turbofit.serving.engine import process
from turbofit.serving.engine.lmdeploy import Lmdeploy

WORDS = ["serve", "internvl2-8b", "--on", "1xrtx3090", "--pretend"]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The gateway's settings that the launch would be given."""
    monkeypatch.delenv("TURBOFIT_API_KEY", raising=False)
    monkeypatch.delenv("TURBOFIT_API_KEYS", raising=False)
    given: list[Any] = []
    monkeypatch.setattr(serve, "_serve_model", lambda one, *_: given.append(one.gateway) or 0)
    return given


def test_the_network_needs_a_key_or_a_word(config: list[Any], monkeypatch, capsys) -> None:
    assert main(WORDS) == 0  # loopback needs none
    assert (config[0].host, config[0].port, config[0].api_key) == ("127.0.0.1", 23333, ())
    assert main([*WORDS, "--host", "0.0.0.0"]) == 2
    assert "no key is set" in capsys.readouterr().err
    assert main([*WORDS, "--host", "0.0.0.0", "--dry-run"]) == 2  # as the start that it shows
    assert "no key is set" in capsys.readouterr().err
    assert main([*WORDS, "--host", "0.0.0.0", "--no-auth"]) == 0
    assert main([*WORDS, "--host", "0.0.0.0", "--api-key", "a", "--api-key", "b"]) == 0
    assert config[-1].api_key == ("a", "b")
    monkeypatch.setenv("TURBOFIT_API_KEY", "c")
    assert main([*WORDS, "--host", "0.0.0.0", "--port", "8080"]) == 0
    assert (config[-1].api_key, config[-1].port) == (("c",), 8080)
    monkeypatch.delenv("TURBOFIT_API_KEY")
    assert main([*WORDS, "--no-gateway", "--", "--api-keys", "k"]) == 0
    assert main([*WORDS, "--no-gateway", "--host", "127.0.0.1", "--port", "8080"]) == 0
    assert config[-2:] == [None, None]


def test_it_says_where_keys_cross_the_network_in_clear(config: list[Any], capsys) -> None:
    assert main([*WORDS, "--host", "0.0.0.0", "--api-key", "a"]) == 0
    assert "keys and prompts cross the network in clear" in capsys.readouterr().err
    assert main([*WORDS, "--api-key", "a"]) == 0
    tls = ["--ssl-certfile", "a.pem", "--ssl-keyfile", "a.key"]
    assert main([*WORDS, "--host", "0.0.0.0", "--api-key", "a", *tls]) == 0
    assert "in clear" not in capsys.readouterr().err


def test_several_keys_share_no_prefix_cache_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    requests: list[Any] = []
    monkeypatch.setattr(serve, "_serve_model", lambda one, *_: requests.append(one.request) or 0)
    two, front = ["--api-key", "a", "--api-key", "b"], ["--front-key-file", str(tmp_path / "key")]
    (tmp_path / "key").write_text("k\n")
    for words, on, said in (
        (["--api-key", "a"], None, ""),
        (two, False, serve.CACHE_IS_OFF),
        (front, False, serve.CACHE_IS_OFF),  # a front's clients may have keys of their own
        ([*two, "--enable-prefix-caching"], True, serve.SHARED_CACHE),
        ([*two, "--no-enable-prefix-caching"], False, ""),
    ):
        assert main([*WORDS, *words]) == 0
        err = capsys.readouterr().err
        assert requests[-1].enable_prefix_caching is on
        assert [text for text in (serve.CACHE_IS_OFF, serve.SHARED_CACHE) if text in err] == (
            [said] if said else []
        )
    plan = tmp_path / "plan.json"
    plan.write_text(turbofit.plan("qwen2-vl-2b", on="1xrtx3090").to_json())
    assert main(["serve", "--plan", str(plan), "--pretend", *two]) == 0
    assert serve.SHARED_CACHE in capsys.readouterr().err
    with plan.open("rb") as file:  # a pipe gives its bytes once
        monkeypatch.setattr("sys.stdin", TextIOWrapper(file))
        assert main(["serve", "--plan", "-", "--pretend", *two]) == 0
    err = capsys.readouterr().err
    assert err.count(serve.SHARED_CACHE) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # A key above all: nobody would be asked for it.
        ("--no-gateway --api-key k", "--api-key is for the gateway"),
        ("--no-gateway --host 0.0.0.0", "--host is for the gateway"),
        ("--no-gateway --ssl-certfile a", "--ssl-certfile is for the gateway"),
        ("-- --api-keys k", "which ask the gateway"),
        ("-- --allow-origins *", "which ask the gateway"),
        ("--ssl-certfile x", "go together"),
        ("--drain soon", "is no time"),
        ("--name a", "is for a cluster"),
        ("--idle 1m --no-gateway", "do not go together"),
        ("internvl2-8b", "one model at a time"),
    ],
)
def test_what_is_refused(words: str, said: str, config: list[Any], capsys) -> None:
    assert main([*WORDS, *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert config == []


HOUSE = Path(turbofit.__file__).parent
#: Files of turbofit from the command to the child.
MOST_FILES = 15


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled by the first start of an engine: the files of turbofit on the stack, top first."""
    found: list[str] = []

    def popen(*_: Any, **__: Any) -> Any:
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        found.extend(str(file.relative_to(HOUSE)) for file in files if HOUSE in file.parents)
        raise OSError(2, "no process is started here")

    monkeypatch.setattr(process.subprocess, "Popen", popen)
    monkeypatch.setenv("XDG_STATE_HOME", sharing_libraries(tmp_path / "state"))
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    return found


@pytest.mark.lmdeploy
@pytest.mark.parametrize(
    "words",
    [
        ["serve", "internvl2-1b", "--port", "0"],
        ["serve", "internvl2-1b", "--port", "0", "--idle", "10m"],
        ["calibrate", "internvl2-1b"],
        ["tune", "internvl2-1b", "--starts", "1"],
    ],
)
def test_from_the_command_to_the_child(words: list[str], stack: list[str]) -> None:
    main([*words, "--pretend", "--on", "1xrtx3060"])
    assert stack[-1] == "serving/process/child.py"
    assert len(set(stack)) <= MOST_FILES, stack
    rooms = [file.partition("/")[0] for file in stack]
    assert "cli" not in rooms[rooms.index("serving") :], stack


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "internvl2-1b"],
        ["serve", "internvl2-1b", "--idle", "10m"],
        ["calibrate", "internvl2-1b"],
        ["tune", "internvl2-1b", "--starts", "1"],
    ],
)
def test_a_state_folder_that_cannot_be_written_is_said(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TURBOFIT_LEASES", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "lmdeploy_if_needed", lambda _: Lmdeploy(REFERENCE, ("lmdeploy",)))
    assert main([*words, "--pretend", "--on", "1xrtx3060"]) == 5
    errors = [line for line in capsys.readouterr().err.splitlines() if "Not a directory" in line]
    assert errors == ["error: the state folder cannot be written: Not a directory"]
