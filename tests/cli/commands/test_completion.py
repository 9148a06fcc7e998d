"""What shells offer while a line of turbofit is typed."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from turbofit.cli.main import main

#: What each shell offers for the last word of a line.
OFFERED = {
    "plan internvl2-8": {"internvl2-8b"},
    "plan m --cache-m": {"--cache-max-entry-count"},
    "diagnose x --on 4xrtx30": {"4xrtx3090"},
    "plan m --on --tp 2 --go": {"--goal"},
}


def bash(line: str) -> str:
    words = line.split(" ")
    return (
        f"COMP_WORDS=({' '.join(repr(word) for word in words)})\n"
        f"COMP_CWORD={len(words) - 1}\nCOMP_LINE='{line}'\nCOMP_POINT={len(line)}\n"
        "$(complete -p turbofit | sed 's/.*-F \\([^ ]*\\).*/\\1/') turbofit\n"
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )


def fish(line: str) -> str:
    return f"complete -C '{line}'"


@pytest.mark.slow
@pytest.mark.parametrize("asks", [bash, fish])
def test_a_shell_completes_commands_options_and_presets(asks, capsys, tmp_path) -> None:
    shell = asks.__name__
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for line, words in OFFERED.items():
        done = subprocess.run(
            [shell, "-c", f"{script}\n{asks(f'turbofit {line}')}"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
        assert words <= {one.partition("\t")[0] for one in done.stdout.splitlines()}, done


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
def test_zsh_reads_it(capsys) -> None:
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef turbofit")
    done = subprocess.run(["zsh", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_TURBOFIT_COMPLETE=zsh_complete" in text


def test_another_shell(monkeypatch, capsys) -> None:
    assert main(["completion", "csh"]) == 2
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err
    monkeypatch.setenv("_TURBOFIT_COMPLETE", "csh_complete")
    assert main([]) == 2
    assert "is nothing that a shell asks for" in capsys.readouterr().err
