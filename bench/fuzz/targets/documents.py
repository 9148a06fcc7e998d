"""Documents that turbofit wrote and reads back, by the first byte."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import msgspec

from bench.common.plans import machine, plausible_plan
from bench.fuzz.scratch import scratch, state_in
from turbofit.core.cluster import Cluster, ClusterPlan, Node
from turbofit.core.errors import UsageError
from turbofit.core.machine import Calibration
from turbofit.core.presets import load_yaml
from turbofit.core.run_report import RunAttempt, RunReport
from turbofit.core.struct import decode, to_builtins
from turbofit.kernels.census import Census, Count
from turbofit.launch.calibrate.progress import Progress
from turbofit.launch.cluster.source import cluster_from
from turbofit.launch.serve import retry_memory
from turbofit.launch.serve.leases import Leases
from turbofit.machine.snapshot import load_snapshot
from turbofit.observe import calibrations
from turbofit.report.stored_documents import read_saved
from turbofit.report.views.plan.plan_view import plan_view

WORDS: Final = (
    '"schema":"turbofit.plan/1"', '"turbofit.machine/1"', '"turbofit.report/1"', '"turbofit.run/1"',
    '"NA"', "null", "true", "[]", "{}", "-1", "0", "1e308", "9223372036854775807",
    "18446744073709551616",
    '"\\x5cud800"', "[[[[[[[[", "&a", "*a", "!!python/object", "? ", "- ",
)  # fmt: skip
_PLAN: Final = plausible_plan()


def one(data: bytes) -> None:
    """What cannot be read is a UsageError, or as good as absent where nobody asked for it."""
    if not data:
        return
    with suppress(UsageError):
        _READERS[data[0] % len(_READERS)](data[1:])


def _file(data: bytes) -> str:
    path = scratch("documents") / "document.json"
    path.write_bytes(data)
    return str(path)


def _plan(data: bytes) -> None:
    saved = read_saved(_file(data))
    plan_view(saved.plan, saved.run)


def _run(data: bytes) -> None:
    folder = scratch("run")
    (folder / "run.json").write_bytes(data)
    (folder / "plan.json").write_text(_PLAN.to_json())
    saved = read_saved(str(folder))
    plan_view(saved.plan, saved.run)


def _census(data: bytes) -> None:
    census = decode(data, Census, what="census")
    for capability in ((8, 6), (9, 0), (8, 7)):
        census.has_ptx(capability)
        census.count(tuple(census.families), census.architecture(capability) or "")


def _calibration(data: bytes) -> None:
    with state_in(scratch("state")) as state:
        folder = state / "calibrations"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.json").write_bytes(data)
        calibrations.with_calibrations(_PLAN.machine, pretend=False)
        for one in calibrations.recall(pretend=False):
            with suppress(UsageError):
                calibrations.read(one)


def _learned(data: bytes) -> None:
    with state_in(scratch("state")):
        path = retry_memory._path(_PLAN, "0.18.0", False)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        assert isinstance(retry_memory.recall(_PLAN, "0.18.0", pretend=False), dict)


def _lease(data: bytes) -> None:
    folder = scratch("leases")
    leases = Leases(folder)
    (folder / "other.json").write_bytes(data)
    for _ in leases._all():
        pass


def _progress(data: bytes) -> None:
    with state_in(scratch("state")):
        Progress("m", {}, pretend=False)._path().write_bytes(data)
        assert isinstance(Progress("m", {}, pretend=False).complete, bool)


def _snapshot(data: bytes) -> None:
    load_snapshot(_file(data))


def _cluster(data: bytes) -> None:
    cluster_from(_file(data))


def _cluster_plan(data: bytes) -> None:
    ClusterPlan.from_json(data)


def _yaml(data: bytes) -> None:
    path = scratch("documents") / "preset.yaml"
    path.write_bytes(data)
    load_yaml(path)


_READERS: Final[tuple[Callable[[bytes], Any], ...]] = (
    _plan,
    _run,
    _snapshot,
    _cluster,
    _cluster_plan,
    _census,
    _calibration,
    _learned,
    _lease,
    _progress,
    _yaml,
)


def seeds() -> list[bytes]:
    """A document of each kind; those that hold a plan hold a small one."""
    plan = plausible_plan(gpus=1, tp=1)
    saved, cards = to_builtins(plan), machine(1)
    figure = {"what": "steady", "forecast": 5, "actual": 4, "gpu": 0}
    moment = {"phase": "ready", "at": 6.0, "used": {"0": 5}}
    attempt = {
        "started": plan.created, "number": 0, "engines": [{"group": 0, "beside": [figure]}],
        "moments": [moment], "ended": {"kind": "out_of_memory", "message": "m", "hint": "h"},
    }  # fmt: skip
    run = RunReport(
        schema="turbofit.run/1", turbofit_version="0", started=plan.created, state="ended",
        urls=("http://127.0.0.1:1",), attempts=(msgspec.convert(attempt, RunAttempt),),
    )  # fmt: skip
    calibration = Calibration(
        model="m", engine="turbomind", engine_version="0.18.0", lmdeploy="0.18.0", driver="560",
        gpus=("NVIDIA GeForce RTX 3090",), communicator="none", when="", context=1, buffers=2,
    )  # fmt: skip
    node = Node(id="n", name="n", address="a", machine=cards)
    cluster = Cluster(source="a file", nodes=(node,))
    seen = {"group": 0, "cards": [], "pretend": False}
    lease = {"pid": 1, "uid": 0, "model": "m", "need": {"GPU-0": 5}, "engines": [[1, 2]]}
    families = {"attention": {"86": Count(code=1, empty=0)}}
    census = Census(library="l", architectures=("86", "90a"), ptx=("90",), families=families)
    progress = {
        "schema": "turbofit.calibrating/1",
        "plan": saved,
        "seen": [seen],
        "texts": {"0": 1},
    }
    documents: tuple[tuple[Callable[[bytes], Any], Any], ...] = (
        (_plan, saved),
        (_plan, {"schema": "turbofit.report/1", "plan": saved, "run": run}),
        (_run, run),
        (_snapshot, cards),
        (_cluster, cluster),
        (_census, census),
        (_calibration, {"schema": "turbofit.calibration/1", "calibration": calibration}),
        (_learned, {"schema": "turbofit.learned/1", "changes": {"tp": 2}}),
        (_lease, lease),
        (_progress, {**progress, "finished": [0]}),
    )
    found = [bytes((_READERS.index(read),)) + msgspec.json.encode(it) for read, it in documents]
    return [*found, bytes((_READERS.index(_yaml),)) + b"a: &a [1, {b: c}]\nd: *a\n"]
