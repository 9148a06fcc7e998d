"""`turbofit which` on the command line: a table, JSON by its schema, a page."""

from __future__ import annotations

import json

import jsonschema
import pytest
import referencing

from tests.support.plans import few_presets
from tests.sweep import sweep
from turbofit.cli.main import main
from turbofit.machine.presets import preset_names
from turbofit.report.schema import schema_text

pytestmark = pytest.mark.slow


def test_cards_in_each_form(capsys, monkeypatch) -> None:
    few_presets(monkeypatch, sorted({"h200", *sweep(sorted(preset_names()), every=12)}))
    question = ["which", "internvl2-26b-awq", "--concurrency", "2"]
    assert main(question) == 0
    told = capsys.readouterr().out
    assert "preset cards keep the promise (concurrency 2), each with as few GPUs" in told
    assert "tp 1 x 1" not in told
    assert main([*question, "--full"]) == 0
    assert "tp 1 x 1" in capsys.readouterr().out
    assert main([*question, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plans = referencing.Resource.from_contents(json.loads(schema_text("plan")))
    registry = referencing.Registry().with_resource("urn:turbofit:plan:2", plans)
    jsonschema.Draft202012Validator(json.loads(schema_text("which")), registry=registry).validate(
        found
    )
    assert (found["request"], found["counts"]) == ({"concurrency": 2}, [1, 2, 4, 8])


def test_nothing_that_keeps_the_promise_and_the_models_of_a_machine(capsys, monkeypatch) -> None:
    few_presets(monkeypatch)
    assert main(["which", "internvl2-1b", "--images-per-second", "1e9"]) == 3
    assert "0 of" in capsys.readouterr().out
    assert main(["which", "--on", "2x24GB", "--engine", "turbomind", "--context", "1k"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("Models on 2x24GB\n")
    assert " images " in told.out  # which the context makes smaller
    assert " tiles " in told.out
    assert "assumed: 24GB has no preset" in told.err


def test_more_cards_that_do_no_more_are_in_the_whole_answer_alone(capsys, monkeypatch) -> None:
    few_presets(monkeypatch, ["rtx2080ti", "rtx2080ti-22g"])
    assert main(["which", "internvl2-8b"]) == 0
    assert "2xrtx2080ti " not in (told := capsys.readouterr().out)
    assert "1xrtx2080ti-22g " in told
    assert main(["which", "internvl2-8b", "--full"]) == 0
    assert "2xrtx2080ti " in capsys.readouterr().out
