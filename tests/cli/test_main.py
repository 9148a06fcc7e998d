from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.processes import REPO
from turbofit.cli.command import CliCommand, Option
from turbofit.cli.main import main
from turbofit.cli.manual import COMMANDS, EXIT_CODES, MANUAL, manual_text
from turbofit.core.errors import DoesNotFitError
from turbofit.core.installation import install_command

Out = pytest.CaptureFixture[str]


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "turbofit", *words],
        capture_output=True, text=True, check=False, env={**os.environ, **environ},
    )  # fmt: skip


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command that does what the test says."""
    made = ModuleType("turbofit.cli.commands.fake")
    as_json = Option("--json", "as_json", is_flag=True, form=True)
    made.fake = CliCommand(lambda **given: made.run(given), [as_json])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setitem(COMMANDS, "fake", "for tests")
    return made


def raises(exc: BaseException) -> Any:
    """A ``run`` that fails."""

    def run_(_: Any) -> int:
        raise exc

    return run_


def test_help_lists_every_command_and_only_standing_ones(capsys: Out) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert f"  {name} " in text
        assert line in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", list(MANUAL))
def test_each_help_page_ends_with_its_manual(name: str, capsys: Out) -> None:
    assert main([name, "--help"]) == 0
    page = capsys.readouterr().out
    assert f"turbofit {name}" in page
    assert page.rstrip().endswith(manual_text(name).rstrip())
    for word in ("examples:", "exit codes: 0 done; 1 a bug", "touches: "):
        assert word in page
    assert max(map(len, manual_text(name).splitlines())) <= 100


def test_every_command_has_a_manual_and_exit_codes_are_known() -> None:
    assert set(MANUAL) == set(COMMANDS)
    assert all(code in EXIT_CODES for manual in MANUAL.values() for code in manual.exits)
    assert manual_text("nothing") == ""


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["plaan"], "unknown command 'plaan'", "did you mean plan?"),
        (["plan", "m", "--tp"], "option '--tp' requires an argument", "plan --help"),
        (["plan", "m", "--", "--tp", "2"], "nothing after --", "--help"),
        (["plan", "m", "--", "--json"], "nothing after --", "--help"),  # which is not ours
        (["report", "/no/such/file"], "cannot be read", "--json > plan.json"),
        (["serve"], "needs a model", "--plan"),
        (
            ["PytorchEngineConfig(tp=2)"],
            "a command stands first",
            "turbofit plan MODEL 'PytorchEngineConfig(tp=2)'",
        ),
        (
            ["pipeline('m', backend_config=TurbomindEngineConfig(tp=2))"],
            "a command stands first",
            "turbofit plan 'pipeline(",
        ),
        (["lmdeploy serve api_server m --tp=2"], "unknown command", "turbofit serve api_server"),
    ],
)
def test_wrong_use_is_said_in_two_lines(words, message, hint, capsys) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith("hint: ")
    assert hint in second


def test_errors_as_json(capsys: Out) -> None:
    for words, message in (
        (["plan", "m", "--tp", "0"], "--tp '0'"),
        (["plan", "m", "--md"], "do not go together"),
        (["plam"], "unknown command"),
    ):
        assert main([*words, "--json"]) == 2
        captured = capsys.readouterr()
        assert captured.err == ""
        error = json.loads(captured.out)["error"]
        assert (error["kind"], error["exit_code"]) == ("usage", 2)
        assert message in error["message"]


def no_module(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("exc", "code", "said"),
    [
        (DoesNotFitError("too\nlarge \x1b[31m", hint="less"), 3,
         "error: too large ?[31m\nhint: less\n"),
        (KeyboardInterrupt(), 130, ""),
        (no_module("aiohttp"), 7, install_command("gateway")),
        (no_module("ray.util"), 7, install_command("ray")),
        (no_module("turbofit.nothing"), 1, "a bug in turbofit"),
    ],
)  # fmt: skip
def test_each_error_leaves_with_its_code(exc, code, said, module: Any, capsys: Out) -> None:
    module.run = raises(exc)
    assert main(["fake"]) == code
    told = capsys.readouterr().err
    assert said in told if said else not told


@pytest.mark.parametrize(("command", "extra"), [("serve", "lmdeploy"), ("bench", "gateway")])
def test_who_serves_lacks_lmdeploy_too(
    command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    """Not one hint after the other."""
    monkeypatch.setattr("turbofit.core.installation.installed", lambda *_: None)
    monkeypatch.setattr("turbofit.cli.main._run", raises(no_module("aiohttp")))
    assert main([command, "api_server", "internvl2-8b"]) == 7
    assert install_command(extra) in capsys.readouterr().err


def test_a_bug_is_said_as_one_and_kept(module: Any, tmp_path, monkeypatch, capsys: Out) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    module.run = raises(RuntimeError("two\nlines"))
    assert main(["fake"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: a bug in turbofit: RuntimeError: two lines"
    (path,) = (tmp_path / "turbofit" / "crashes").iterdir()
    assert str(path) in second
    assert "Traceback" in path.read_text()
    assert path.stat().st_mode & 0o77 == 0
    assert main(["fake", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "bug"
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    assert main(["fake"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "start", ["-m turbofit", "-c 'from turbofit.__main__ import entry; entry()'"]
)
def test_ctrl_c_while_it_imports_says_nothing(start: str, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("print('imports', flush=True)\ninput()\n")
    child = subprocess.Popen(
        [sys.executable, *shlex.split(start), "--version"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "imports\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate() == ("", "")
    assert child.returncode == 130


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m turbofit models | head -1",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("Models\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("internvl2-1b", "the answer cannot be written to stdout: No space left on device"),
        ("internvl2-8 --json", "no model is known as 'internvl2-8'"),
    ],
)
def test_a_full_disk_behind_stdout_is_no_bug(words: str, cause: str) -> None:
    argv = [sys.executable, "-m", "turbofit", "plan", *words.split(), "--on", "1xl4", "-q"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error == f"error: {cause}"
    assert hint.startswith("hint: ")


def test_help_and_planning_stay_light() -> None:
    code = (
        "import sys\n"
        "from turbofit.cli.main import main\n"
        "main({argv})\n"
        "heavy = {{'torch', 'transformers', 'lmdeploy', 'pynvml', 'urllib.request', 'ssl',"
        " 'numpy', 'PIL', 'http.client', 'subprocess', 'logging', 'asyncio', {more}}}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    plan = ["plan", "internvl2-8b", "--on", "4xrtx3090", "--json"]
    # Pydantic, which validates what is asked for, takes along what it needs itself.
    for argv, more in ((["--help"], "'pydantic', 'dataclasses'"), (plan, "'pydantic.v1'")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv=argv, more=more)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr.strip() == "[]"
