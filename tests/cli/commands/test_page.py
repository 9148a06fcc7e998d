"""`turbofit page` on the command line."""

from __future__ import annotations

import json

from tests.report.schema.test_schema import check
from turbofit.cli.main import main

FEW = [
    "--models", "internvl3-2b", "--cards", "rtx4090", "--counts", "1", "--used", "0",
    "--images", "1", "--contexts", "8192", "--concurrencies", "8",
]  # fmt: skip


def test_a_site(tmp_path, capsys) -> None:
    folder = tmp_path / "a" / "site"
    assert main(["page", "--out", str(folder), *FEW]) == 0
    told = capsys.readouterr()
    assert told.out == f"{folder / 'index.html'}\n"
    assert told.err.startswith(f"4 plans for {folder}, with 1 process")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["data/internvl3-2b/rtx4090.js", "index.html"]
    script = (folder / files[0]).read_text()
    table = json.loads(script.removeprefix("turbofitTable(").removesuffix(");\n"))
    assert len(table["order"]) == 4
    assert max(table["order"]) == len(table["answers"]) - 1


def test_every_answer_as_a_document(tmp_path, capsys) -> None:
    assert main(["page", "--out", str(tmp_path), *FEW, "--json"]) == 0
    text = capsys.readouterr().out
    check("page", text)
    answers = json.loads(text)["answers"]
    asked = [(one["context"], one["concurrency"]) for one in answers]
    assert sorted(asked, key=str) == [(8192, 8), (8192, None), (None, 8), (None, None)]
    row = answers[-1]
    words = ["--on", row["on"], "--context", "8192", "--concurrency", "8", "--json"]
    assert main(["plan", row["model"], *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert row["answer"]["verdict"] == plan["verdict"]
    assert row["answer"]["kv_tokens"] == plan["kv"]["total_tokens"]
