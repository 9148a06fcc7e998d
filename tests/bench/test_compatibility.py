"""How the bench folds answers into the table, and the installed pair against the table's row."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from bench.compatibility import environments
from bench.compatibility.environments import probe
from bench.compatibility.jobs import make_jobs
from bench.compatibility.table import Outcome, fold, listed, render
from turbofit.core.presets import preset_path
from turbofit.planning.compatibility import FrontEnd, compatibility

LLAVA, CHAT = "LlavaForConditionalGeneration", "InternVLChatModel"


def failed(error: str, step: str = "image") -> dict[str, str]:
    return {"step": step, "error": error, "where": "lmdeploy/x.py:1 f"}


def folded(lmdeploy: str, transformers: str, **families: object) -> list[Outcome]:
    return fold(lmdeploy, transformers, {"families": families})


def test_published_code_stands_for_the_family_and_the_last_answer_of_a_pair_counts() -> None:
    told = {
        f"{CHAT}+published": {"pytorch": None},
        f"{CHAT}+training": {"pytorch": failed("E: dict", "class")},
    }
    values = yaml.safe_load(render(folded("0.18.0", "5.0.0", **told), source="a test"))
    assert values["families"]["pytorch"] == [CHAT]
    assert [one["architectures"] for one in values["failures"]] == [[f"{CHAT}+training"]]
    pairs = [
        folded("0.18.0", "5.0.0", **{LLAVA: {"pytorch": said}}) for said in (failed("E"), None)
    ]
    assert yaml.safe_load(render([*pairs[0], *pairs[1]], source="a test"))["failures"] is None


def test_what_the_table_has_makes_the_table_again() -> None:
    """So that a new release is written beside it."""
    path = preset_path("engines", "compatibility")
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    text = render(listed(), source=before["source"], allowed="!=5.0.*,>=4.56.0")
    again = yaml.safe_load(text)
    for key in ("transformers", "families", "failures"):
        assert again[key] == before[key]
    assert again["outside"] == ["4.50.3", "4.53.3", "5.0.0"]


def test_a_probe_that_dies_is_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho killed >&2\nexit 9\n")
    python.chmod(0o755)
    monkeypatch.setattr(environments.sys, "executable", str(python))
    found = probe([], [], tmp_path)
    assert found["failed"]["error"] == "exit 9: killed"


def test_jobs_have_what_turbofits_rules_say(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "configuration_internvl_chat.py").write_text("")
    jobs = {job["name"]: job for job in make_jobs(tmp_path, {"published": code})}
    chat = jobs[f"{CHAT}+published"]
    assert jobs[LLAVA]["tokens"] == 576
    assert not jobs[LLAVA]["trust"]
    assert chat["tokens"] == 7 * 256
    assert chat["engines"] == ["turbomind", "pytorch"]
    assert chat["trust"]
    assert all(job["elements"] > 0 for job in jobs.values())
    names = {job["architecture"] for job in jobs.values()}
    assert names == set(compatibility().families["pytorch"])


@pytest.mark.lmdeploy
@pytest.mark.exhaustive
def test_the_installed_pair_is_as_the_table_says(tmp_path: Path) -> None:
    done = probe([], make_jobs(tmp_path, {}), tmp_path)
    assert done["versions"]["transformers"] == version("transformers")
    for name, told in done["families"].items():
        for engine in {"turbomind", "pytorch"} & told.keys():
            failure = FrontEnd(version("lmdeploy"), name, engine).failure(version("transformers"))
            seen = told[engine] and (told[engine]["step"], told[engine]["error"])
            assert seen == (failure and (failure.step, failure.error)), (name, engine)


def test_the_extras_bring_no_version_that_was_not_tried() -> None:
    newest = {versions[-1] for versions in compatibility().transformers.values()}
    assert len(newest) == 1
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.findall(r'^    "(transformers[^"]*)",', text, re.MULTILINE)
    assert [bound.rpartition("<=")[2] for bound in bounds] == [*newest] * 2
