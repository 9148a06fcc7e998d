"""`turbofit init`: a profile that promises what its plan did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from scripts.schemas import profile_document
from tests.cli.options.test_profile import as_editors_read
from turbofit.cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_profile_that_plans_the_same(folder, capsys):
    words = ["internvl2-8b", "--on", "2xrtx3090", "--image-size", "800x600", "--margin", "2%"]
    assert main(["plan", *words, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(["init", *words]) == 0
    assert capsys.readouterr().out == "turbofit.yaml\n"
    text = (folder / "turbofit.yaml").read_text()
    Draft202012Validator(profile_document()).validate(as_editors_read(text))
    assert f"  context: {before['settings']['session_len']}\n" in text
    assert "engine turbomind" in text
    assert len(text.splitlines()) < 20
    assert main(["plan", "-f", "turbofit.yaml", "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    for key in ("settings", "limits", "kv", "parallel"):
        assert after[key] == before[key]


def test_a_file_that_is_there_stays(folder, capsys):
    (folder / "turbofit.yaml").write_text("mine")
    assert main(["init", "internvl2-2b", "--on", "1xrtx3090"]) == 2
    assert (folder / "turbofit.yaml").read_text() == "mine"
    assert main(["init", "internvl2-2b", "--on", "1xrtx3090", "--force"]) == 0
    assert (folder / "turbofit.yaml").read_text() != "mine"


def test_a_name_that_is_too_long_is_refused(folder, capsys):
    assert main(["init", "internvl2-2b", "--on", "1xrtx3090", "--out", "a" * 300]) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


def test_what_does_not_fit_is_no_profile(folder, capsys):
    assert main(["init", "internvl2-26b", "--on", "1xrtx3060"]) == 3
    assert not (folder / "turbofit.yaml").exists()
