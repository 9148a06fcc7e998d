"""Several models: the folder of each start."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from turbofit.launch import serve_models


def test_only_folders_of_runs_that_have_ended_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: dict[str, Any] = {}

    class Run:
        def __init__(self, name: str, *_: Any, **__: Any) -> None:
            self._name, self._starts = name, 0

        def prepare(self) -> None:
            self._starts += 1

        def begin(self) -> Path:
            self.folder = tmp_path / f"{self._name}-{self._starts}"
            self.folder.mkdir()
            return self.folder

        def follow(self, _: Any) -> None:
            folder = self.folder
            if folder.name == "busy-1":
                for _ in range(serve_models._KEPT_RUNS + 1):
                    launches["sleepy"](None, None)
                assert folder.exists()

    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr(serve_models, "Run", Run)
    monkeypatch.setattr(
        serve_models, "ModelRun",
        lambda model, _, launch, __: launches.update({model.name: launch}),
    )  # fmt: skip
    folders: deque[Path] = deque()
    for name in ("busy", "sleepy"):
        plan = SimpleNamespace(model=SimpleNamespace(weight_bytes=1))
        planned: Any = SimpleNamespace(config=name, plan=plan)
        model: Any = SimpleNamespace(name=name)
        front: Any = None
        serve_models._model_run(planned, model, front, None, folders, lambda _: None)
    launches["busy"](None, None)
    names = {path.name for path in tmp_path.iterdir()} - {"leases"}
    assert names == {folder.name for folder in folders}
    assert len(names) == serve_models._KEPT_RUNS
    assert "busy-1" in names
