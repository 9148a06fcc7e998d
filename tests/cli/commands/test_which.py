"""`turbofit which` on the command line: a table, JSON by its schema, a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import referencing

from tests.support.plans import few_presets
from turbofit.cli.main import main
from turbofit.core.which import Which
from turbofit.planning.request import WhichRequest
from turbofit.planning.which import which_cards
from turbofit.report.schema import schema_text

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def planned_once() -> Iterator[None]:
    """The same question is planned once, and told in several forms."""
    kept: dict[str, Which] = {}

    def once(request: WhichRequest) -> Which:
        if (asked := repr(request)) not in kept:
            kept[asked] = which_cards(request)
        return kept[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("turbofit.planning.which.which_cards", once)
        yield


QUESTION = ["which", "internvl2-26b-awq", "--concurrency", "2"]


def test_cards_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(QUESTION) == 0
    told = capsys.readouterr().out
    assert "preset cards keep the promise (concurrency 2), each with the fewest of" in told
    assert "tp 1 x 1" not in told
    assert "more that do, 5 that do not: --full" in told
    assert main([*QUESTION, "--full"]) == 0
    whole = capsys.readouterr().out
    assert "tp 1 x 1" in whole
    assert len(whole.splitlines()) > 65 > 20 >= len(told.splitlines())


def test_cards_as_json_by_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUESTION, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(
        json.loads(schema_text("which")), registry=referencing.Registry()
    ).validate(found)
    assert found["request"] == {"concurrency": 2}
    assert found["counts"] == [1, 2, 4, 8]


def test_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cards.html"
    assert main([*QUESTION, "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    text = file.read_text()
    assert "What keeps the promise" in text
    assert "1xh200" in text


def test_nothing_that_keeps_the_promise_ends_with_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_presets(monkeypatch)
    assert main(["which", "internvl2-1b", "--images-per-second", "1e9"]) == 3
    assert "0 of" in capsys.readouterr().out


def test_a_machine_where_a_model_should_stand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_presets(monkeypatch)
    assert main(["which", "2x24GB", "--engine", "turbomind", "--context", "1k"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("Models on 2x24GB\n")
    assert "assumed: 24GB has no preset" in told.err
