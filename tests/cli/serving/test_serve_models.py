"""Several models: the folder of each start."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from turbofit.cli.serving import serve_models
from turbofit.launch.models import model_session
from turbofit.launch.serve import session


def test_only_folders_of_runs_that_have_ended_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, Any] = {}

    class Launch:
        def __init__(self, name: str, *_: Any) -> None:
            self._name, self._starts = name, 0

        def plan(self, _: Any) -> None:
            pass

        def job(self, *_: Any, **__: Any) -> Any:
            self._starts += 1
            folder = tmp_path / f"{self._name}-{self._starts}"
            folder.mkdir()
            return SimpleNamespace(folder=folder)

    def follow(job: Any, *_: Any) -> None:
        if job.folder.name == "busy-1":
            for _ in range(serve_models._KEPT_RUNS + 1):
                runs["sleepy"](None, None)
            assert job.folder.exists()

    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr(serve_models, "ServeLaunch", Launch)
    monkeypatch.setattr(session, "run_session", follow)
    monkeypatch.setattr(
        model_session, "ModelSession", lambda model, _, run, __: runs.update({model.name: run})
    )
    folders: deque[Path] = deque()
    for name in ("busy", "sleepy"):
        plan = SimpleNamespace(model=SimpleNamespace(weight_bytes=1))
        planned: Any = SimpleNamespace(arguments=name, config=None, plan=plan)
        model: Any = SimpleNamespace(name=name)
        front: Any = None
        serve_models._session(planned, model, front, None, folders)
    runs["busy"](None, None)
    names = {path.name for path in tmp_path.iterdir()} - {"leases"}
    assert names == {folder.name for folder in folders}
    assert len(names) == serve_models._KEPT_RUNS
    assert "busy-1" in names
