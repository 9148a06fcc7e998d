from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from turbofit.cli.main import main

Out = pytest.CaptureFixture[str]


def script(shell: str, capsys: Out) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def bash(line: str, text: str) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    ask = (
        f"{text}\nCOMP_WORDS=({' '.join(repr(word) for word in words)})\n"
        f"COMP_CWORD={len(words) - 1}\nCOMP_LINE='{line}'\nCOMP_POINT={len(line)}\n"
        "$(complete -p turbofit | sed 's/.*-F \\([^ ]*\\).*/\\1/') turbofit\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash_completes_commands_options_and_presets(capsys: Out, tmp_path: Path) -> None:
    text = script("bash", capsys)
    assert "plan" in bash("turbofit pl", text)
    assert "internvl2-8b" in bash("turbofit plan internvl2-8", text)
    assert "--cache-max-entry-count" in bash("turbofit plan m --cache-m", text)
    assert "4xrtx3090" in bash("turbofit plan m --on 4xrtx30", text)
    assert {"throughput", "latency", "context"} <= set(bash("turbofit plan m --goal ", text))
    assert "--goal" in bash("turbofit plan m --on --tp 2 --go", text)
    assert "plan" in bash("turbofit help pl", text)
    assert "4xrtx3090" in bash("turbofit diagnose x --on 4xrtx30", text)


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_reads_it(capsys: Out) -> None:
    text = script("zsh", capsys)
    assert text.startswith("#compdef turbofit")
    done = subprocess.run(["zsh", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_TURBOFIT_COMPLETE=zsh_complete" in text


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
def test_fish_completes_commands_options_and_presets(capsys: Out, tmp_path: Path) -> None:
    path = tmp_path / "turbofit.fish"
    path.write_text(script("fish", capsys))

    def offered(line: str) -> list[str]:
        done = subprocess.run(
            ["fish", "--no-config", "-c", f"source {path}; complete -C '{line}'"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [one.partition("\t")[0] for one in done.stdout.splitlines()]

    assert "plan" in offered("turbofit pl")
    assert "internvl2-8b" in offered("turbofit plan internvl2-8")
    assert "--cache-max-entry-count" in offered("turbofit plan m --cache-m")
    assert "4xrtx3090" in offered("turbofit plan m --on 4xrtx30")


def test_another_shell(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    assert main(["completion", "csh"]) == 2
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err
    monkeypatch.setenv("_TURBOFIT_COMPLETE", "csh_complete")
    assert main([]) == 2
    assert "is no shell's question" in capsys.readouterr().err
