"""What a run with known keys leaves and prints: the keys are in none of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPO, Child
from tests.support.serving import MESSAGES, ask_at
from turbofit.cli.main import main

pytestmark = pytest.mark.slow

MODEL = ("internvl2-8b", "--on", "1xrtx3090")
ENVIRON = {
    "HF_TOKEN": "hf_secretSECRETsecret", "TURBOFIT_UPSTREAM_KEY": "upstream-secret",
    "MODELSCOPE_API_TOKEN": "scope-secret",
}  # fmt: skip
#: Ends with a bug whose message has all that was typed.
CRASHES = """
import sys
from turbofit.serving import run

def bug(*_):
    raise RuntimeError(f"no {sys.argv} {sys.orig_argv}")

run.run_folder = bug
from turbofit.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    folders = {"XDG_STATE_HOME": tmp_path / "state", "TURBOFIT_LEASES": tmp_path / "leases"}
    return {**ENVIRON, **{name: str(path) for name, path in folders.items()}}


def shows_no_secret(texts: list[str], left: Path, words: tuple[str, ...]) -> None:
    """Neither a text nor a file that was left has a secret."""
    secrets = [*ENVIRON.values(), *(word.partition("=")[2] or word for word in words)]
    secrets = [secret for secret in secrets if "secret" in secret]
    assert len(secrets) > len(ENVIRON)
    files = [path for path in left.rglob("*") if path.is_file()]
    assert files
    for where, data in [*((path, path.read_bytes()) for path in files), *enumerate(texts)]:
        text = data if isinstance(data, str) else data.decode(errors="replace")
        assert not [secret for secret in secrets if secret in text], where


@pytest.mark.parametrize(
    "keys",
    [
        ("--api-key", "secret-1", "--api-key=secret-2"),
        ("--no-gateway", "--", "--api-keys", "secret-1", "secret-2"),
        pytest.param(("--no-gateway", "--", "--api-k=secret-1"), marks=pytest.mark.exhaustive),
    ],
)
def test_a_run(keys: tuple[str, ...], children: list[Child], port: int, environ, tmp_path) -> None:
    words = ("serve", *MODEL, "--pretend", "--no-standby", "-vv", "--port", str(port), *keys)
    child = Child([sys.executable, "-m", "turbofit", *words], **environ)
    children.append(child)
    child.wait_for("phase: ready")
    assert child.process.stdout is not None
    url = child.process.stdout.readline().strip()
    body = {"model": "tiny", "messages": MESSAGES}
    for key in ("secret-1", "secret-3"):
        ask_at(url, "/v1/chat/completions", body, Authorization=f"Bearer {key}")
    child.process.send_signal(signal.SIGTERM)
    assert child.finish() == 0
    assert "***" in child.stderr or keys[0] == "--api-key"
    shows_no_secret([child.stderr, url, child.process.stdout.read()], tmp_path, (*keys, "secret-3"))


@pytest.mark.parametrize(
    ("keys", "state"),
    [("--api-key secret-1", "kept"), ("--no-gateway -- --api-keys=secret-1", "lost")],
)
def test_a_bug(keys: str, state: str, environ: dict[str, str], tmp_path: Path) -> None:
    given = tuple(keys.split())
    texts = ("--default-chat-template-kwargs", '{"word": "secret-2"}')
    texts = () if "--no-gateway" in given else texts
    argv = [sys.executable, "-c", CRASHES, "serve", *MODEL, "--pretend", *texts, *given]
    if state == "lost":
        environ["XDG_STATE_HOME"] = "/dev/null"
    (tmp_path / "left").touch()
    done = subprocess.run(
        argv, env={**os.environ, **environ}, cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "error: a bug in turbofit: RuntimeError: no [" in done.stderr
    shown = "".join(path.read_text() for path in tmp_path.glob("state/turbofit/crashes/*"))
    assert "Traceback" in (shown if state == "kept" else done.stderr)
    assert ("serve internvl2-8b" in shown) == (state == "kept")
    shows_no_secret([done.stderr, done.stdout], tmp_path, (*given, *texts))


def test_commands_and_manifests(environ: dict[str, str], tmp_path: Path, monkeypatch, capsys):
    """Those that are shown, and not started; a manifest has the plan's options alone."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    keys = "--no-gateway -- --api-keys secret-1 secret-2"
    dry = ["serve", *MODEL, "--dry-run"]
    texts = []
    for form in ([], ["--json"]):
        assert main([*dry, *form, *shlex.split(keys)]) == 0
        said = capsys.readouterr()
        assert "--api-keys" in said.out
        texts += [said.out, said.err]
        if form == ["--json"]:
            (tmp_path / "plan.json").write_text(said.out)
    assert json.loads((tmp_path / "plan.json").read_text())["serve"]["argv"][-1] == "***"
    for kind in ("systemd", "compose", "k8s"):
        assert main(["export", kind, str(tmp_path / "plan.json")]) == 0
        texts.append(capsys.readouterr().out)
    shows_no_secret(texts, tmp_path, tuple(keys.split()))
