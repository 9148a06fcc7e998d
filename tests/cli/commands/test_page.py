"""`turbofit page` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.schema.test_schema import check
from turbofit.cli.main import main

FEW = [
    "--models", "internvl3-2b", "--cards", "rtx4090", "--counts", "1", "--used", "0",
    "--images", "1", "--contexts", "8192", "--concurrencies", "8",
]  # fmt: skip


def test_a_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "site"
    assert main(["page", "--out", str(folder), *FEW]) == 0
    told = capsys.readouterr()
    assert told.out == f"{folder / 'index.html'}\n"
    assert told.err.startswith(f"4 plans for {folder}: about ")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [str(Path("data", "internvl3-2b", "rtx4090.js")), "index.html"]
    script = (folder / files[0]).read_text()
    assert script.startswith("turbofitTable({")
    table = json.loads(script.removeprefix("turbofitTable(").removesuffix(");\n"))
    assert len(table["order"]) == 4
    assert max(table["order"]) == len(table["answers"]) - 1


def test_every_answer_as_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--out", str(tmp_path), *FEW, "--json"]) == 0
    text = capsys.readouterr().out
    check("page", text)
    document = json.loads(text)
    assert len(document["answers"]) == 4
    asked = {(one["context"], one["concurrency"]) for one in document["answers"]}
    assert asked == {(None, None), (None, 8), (8192, None), (8192, 8)}
    row = document["answers"][-1]
    words = ["--on", row["on"], "--context", "8192", "--concurrency", "8", "--json"]
    assert main(["plan", row["model"], *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert row["answer"]["verdict"] == plan["verdict"]
    assert row["answer"]["kv_tokens"] == plan["kv"]["total_tokens"]
