"""Whatever a file of ours holds: it is read, refused, or as good as absent if nobody named it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.hostile import hostile
from tests.support.plans import plausible_plan
from turbofit.core.cluster import ClusterPlan
from turbofit.core.errors import UsageError
from turbofit.core.presets import load_yaml
from turbofit.core.struct import decode
from turbofit.kernels.census import Census
from turbofit.launch.serve import ladder
from turbofit.launch.serve.leases import Leases
from turbofit.machine.snapshot import load_snapshot
from turbofit.observe import calibrations
from turbofit.report.stored_documents import read_saved
from turbofit.report.views.plan_view import plan_view

PLAN = plausible_plan()


def shown(path: Path) -> None:
    saved = read_saved(str(path))
    plan_view(saved.plan, saved.run)


def run(path: Path) -> None:
    path.rename(path.with_name("run.json"))
    path.with_name("plan.json").write_text(PLAN.to_json())
    shown(path.parent)


def census(path: Path) -> None:
    found = decode(path.read_bytes(), Census, what="census")
    for capability in ((8, 6), (9, 0), (8, 7)):
        found.has_ptx(capability)
        found.count(tuple(found.families), found.architecture(capability) or "")


def moved(path: Path, place: Path) -> Path:
    """The document in its place in turbofit's state folder, which is the document's own."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(place)


def calibration(path: Path) -> None:
    moved(path, path.parent / "turbofit/calibrations/a.json")
    calibrations.with_calibrations(PLAN.machine, pretend=False)
    for one in calibrations.recall(pretend=False):
        with suppress(UsageError):
            calibrations.read(one)


def learned(path: Path) -> None:
    moved(path, ladder._learned(PLAN, "0.18.0", False)._path(make=True))
    assert isinstance(ladder.recall(PLAN, "0.18.0", pretend=False), dict)


def lease(path: Path) -> None:
    folder = moved(path, path.parent / "leases/other.json").parent
    for _ in Leases(folder)._all():
        pass


#: By the first byte.
READERS = (
    shown, run, load_snapshot,
    lambda path: ClusterPlan.from_json(path.read_bytes()), census, calibration, learned, lease,
    load_yaml,
)  # fmt: skip


@hostile("documents")
def test_a_document_is_read_or_refused(data: bytes) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", folder)
        path = Path(folder) / "document.json"
        path.write_bytes(data[1:])
        with suppress(UsageError):
            READERS[(data[:1] or b"\0")[0] % len(READERS)](path)
