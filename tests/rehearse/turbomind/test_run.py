"""How far a rehearsal's child is, as its notes say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from turbofit.core.process.progress import Step, listened
from turbofit.rehearse.turbomind import run
from turbofit.rehearse.turbomind.notes import Notes


def test_how_far_the_child_is_told(tmp_path: Path) -> None:
    spec: Any = SimpleNamespace(cases=("first", "second"))
    heard: list[Step | None] = []
    run._tell(spec, tmp_path)  # nobody listens
    with listened(heard.append):
        run._tell(spec, tmp_path)
        notes = Notes(tmp_path / "report.json")
        notes.at("ready")
        run._tell(spec, tmp_path)
        notes.write(running="first")
        run._tell(spec, tmp_path)
        notes.data["cases"].append({"name": "first"})
        notes.write(running="second")
        run._tell(spec, tmp_path)
    starting = Step("starting the engine on pretend GPUs")
    cases = [Step("rehearsing worst cases on pretend GPUs", done, 2) for done in (0, 1)]
    assert heard == [starting, starting, *cases]
