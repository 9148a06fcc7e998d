"""``turbofit report --share``: what others read of a run names no person, machine or place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from msgspec import inspect
from msgspec.structs import replace
from referencing import Registry, Resource

from tests.report.documents import planned, served_run
from tests.support.plans import changed
from turbofit.cli.main import main
from turbofit.core.machine import Holder, Host, MeasuredRate, MeasuredSteps, StepPoint
from turbofit.core.plan import Plan
from turbofit.core.run_report import RunReport
from turbofit.core.struct import to_json
from turbofit.report.schema import NAMES, schema_text
from turbofit.report.share import shared
from turbofit.report.stored_documents import StoredPlan
from turbofit.serving.calibration import SEEN_FILE, CalibratedGpu, Observation

Out = pytest.CaptureFixture[str]

SECRETS = ("GPU-8f1c", "secret-host", "/srv/alice", "bob", "hunter2", "13:14", "4242424242")

#: The texts that a shared run keeps, each by its type and field. The keys of a dict count as texts.
KEPT = {
    "Adapter.modules", "Backend.communicator", "Backend.version", "CalibratedGpu.used",
    "Draft.algorithm", "EngineRecord.seconds", "Gpu.name", "GpuLedger.name", "Link.ancestor",
    "Machine.cuda", "Machine.driver", "Measured.torch", "MeasuredSteps.weights",
    "Model.architecture", "Model.tensor_bytes", "Plan.turbofit_version", "RunAttempt.changes",
    "RunFigure.what", "RunMoment.phase", "RunMoment.used", "RunReport.lmdeploy",
    "RunReport.state", "RunReport.turbofit_version", "Settings.model_format",
    "Settings.speculative_algorithm", "Surety.kind", "Term.term", "TextDims.architecture",
}  # fmt: skip


def measured() -> Plan:
    """A plan as it is made on a machine of somebody's."""
    plan = planned("fits")
    machine = replace(
        plan.machine, source="nvml", driver="580.159.04", name="secret-host",
        gpus=tuple(
            replace(gpu, uuid=f"GPU-8f1c{gpu.index}", holders=(Holder(pid=7, name="bob", bytes=1),))
            for gpu in plan.machine.gpus
        ),
        host=Host(ram_total=4242424242), warnings=("secret-host is warm",),
    )  # fmt: skip
    model = replace(
        plan.model, name="hunter2", hub_id="alice/hunter2",
        source=replace(plan.model.source, kind="folder", where="/srv/alice/hunter2"),
    )  # fmt: skip
    ledgers = tuple(replace(gpu, uuid=f"GPU-8f1c{gpu.index}") for gpu in plan.ledgers)
    return replace(
        changed(plan, ledgers=ledgers), machine=machine, model=model,
        created="2026-11-20T13:14:00+00:00", verdict="fits: hunter2",
        options={"hf_home": "/srv/alice"},
    )  # fmt: skip


def run_folder(folder: Path, plan: Plan, *, pretend: bool = False) -> Path:
    folder.mkdir()
    run = served_run(plan, pretend=pretend)
    ended = {"kind": "crash", "message": "bob killed /srv/alice/x"}
    (attempt,) = run.attempts
    attempt = replace(attempt, ended=ended, why="secret-host", started="2026-11-20T13:14:00")
    run = replace(
        run, attempts=(attempt,), urls=("http://secret-host",), ended=ended,
        started="2026-11-20T13:14:00",
    )  # fmt: skip
    (folder / "run.json").write_text(to_json(run))
    (folder / "plan.json").write_text(plan.to_json())
    return folder


def test_it_has_the_figures_and_no_names(tmp_path: Path, capsys: Out) -> None:
    plan = measured()
    folder = run_folder(tmp_path / "run", plan)
    used = {"steady": plan.ledgers[0].steady, "sampling": plan.ledgers[0].peak - 5}
    cards = tuple(CalibratedGpu(index=gpu.index, before=0, used=used) for gpu in plan.ledgers)
    steps = MeasuredSteps(
        quant_policy=0, points=(StepPoint(sequences=1, cached=64, seconds=0.01),),
        weights="16 bits", rates=(MeasuredRate(of="bandwidth", value=1e12, spread=0.1),),
    )  # fmt: skip
    seen = (Observation(group=0, free=None, region=None, cards=cards, steps=steps),)
    (folder / SEEN_FILE).write_text(to_json(seen))
    out = tmp_path / "out.json"
    words = ["report", str(folder), "--share", "--out", str(out)]
    assert main(words) == 0
    said, document = capsys.readouterr().out, json.loads(out.read_text())
    for secret in SECRETS:
        assert secret not in out.read_text(), secret
        assert secret not in said, secret
    for word in ("Left out:", "580.159.04", "in use, MiB: sampling", "(crash)"):
        assert word in said
    assert document["seen"][0]["steps"]["rates"][0]["value"] == 1e12
    assert document["plan"]["model"]["name"] == plan.model.architecture
    assert document["run"]["attempts"][0]["ended"] == {"kind": "crash"}
    schemas = [json.loads(schema_text(name)) for name in NAMES]
    registry: Registry[object] = Registry().with_resources(
        (schema["$id"], Resource.from_contents(schema)) for schema in schemas
    )
    Draft202012Validator(json.loads(schema_text("share")), registry=registry).validate(document)
    assert main([*words[:3], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "turbofit.share/2"


class Filled:
    """Fills each type of a document: a secret in every text, and one item in every list."""

    def of(self, kind: Any, where: str = "") -> Any:
        """Return plain data of a type; its texts name the type and the field ``where`` they are."""
        if isinstance(kind, inspect.Metadata):
            return self.of(kind.type, where)
        if isinstance(kind, inspect.StructType):
            name = kind.cls.__name__
            data = {
                field.encode_name: self.of(field.type, f"{name}.{field.name}")
                for field in kind.fields
            }
            return data if kind.tag_field is None else {kind.tag_field: kind.tag, **data}
        if isinstance(kind, inspect.UnionType):
            return self.of(max(kind.types, key=self._tells), where)
        if isinstance(kind, inspect.DictType):
            return {self.of(kind.key_type, where): self.of(kind.value_type, where)}
        if isinstance(kind, inspect.TupleType):
            return [self.of(item, where) for item in kind.item_types]
        if isinstance(kind, inspect.CollectionType):
            return [self.of(kind.item_type, where)]
        if isinstance(kind, inspect.LiteralType):
            return kind.values[0]
        if isinstance(kind, inspect.StrType):
            return f"secret:{where}"
        if isinstance(kind, inspect.BoolType):
            return True
        return 0.5 if isinstance(kind, inspect.FloatType) else 1

    def _tells(self, kind: Any) -> int:
        """Return a larger number for types that have more texts."""
        least = ["NoneType", "IntType", "LiteralType", "StrType"]
        name = type(kind).__name__
        return least.index(name) if name in least else len(least)

    def document(self, kind: Any) -> Any:
        return msgspec.convert(self.of(inspect.type_info(kind)), kind)


def test_of_all_texts_only_those_that_are_named_are_kept(tmp_path: Path) -> None:
    filled = Filled()
    plan, run = filled.document(Plan), filled.document(RunReport)
    plan = replace(plan, machine=replace(plan.machine, source="nvml"))
    run = replace(run, pretend=False)
    texts = set(re.findall(r"secret:([\w.]+)", to_json((plan, run))))
    assert {"Adapter.path", "Settings.hf_overrides", "RunAttempt.why", "Command.env"} < texts
    seen = filled.document(tuple[Observation, ...])
    (tmp_path / SEEN_FILE).write_text(to_json(seen))
    document = shared(StoredPlan(plan, run, str(tmp_path)))
    assert len(document.seen) == 1
    assert set(re.findall(r"secret:([\w.]+)", to_json(document))) == KEPT


@pytest.mark.parametrize("source", ["nvml", "preset"])
def test_pretend_gpus_are_refused(tmp_path: Path, capsys: Out, source: str) -> None:
    plan = measured()
    plan = replace(plan, machine=replace(plan.machine, source=source))
    folder = run_folder(tmp_path / "run", plan, pretend=source == "nvml")
    assert main(["report", str(folder), "--share"]) == 2
    assert "ran on pretend GPUs: it has no figure of a real card" in capsys.readouterr().err


def test_what_is_no_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = run_folder(tmp_path / "run", measured())
    for words, message in (
        (
            (),
            "nothing was served yet\nhint: turbofit serve MODEL, or calibrate MODEL, on real cards",
        ),
        ((str(folder / "plan.json"),), "is a plan, not a run"),
        (("nobody",), "no run is called 'nobody'"),
    ):
        assert main(["report", "--share", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", str(folder), "--out", str(tmp_path / "x.json")]) == 2
    assert "--out is for --share" in capsys.readouterr().err
