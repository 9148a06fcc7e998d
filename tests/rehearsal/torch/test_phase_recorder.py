"""The phases that the child names, and the records of the engine's processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from turbofit.rehearsal.torch.phase_recorder import Phases, read_records


def test_a_phase_waits_for_living_processes_only(tmp_path: Path) -> None:
    phases = Phases(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record = {"pid": gone.pid, "number": 0, "rows": [{"phase": "build", "gpu": 0}]}
    (tmp_path / "records" / "1.json").write_text(json.dumps(record))
    phases.enter("build  model")
    assert (tmp_path / "phase").read_text() == "1 build model"
    assert read_records(tmp_path) == [record]
