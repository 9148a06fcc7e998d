from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.core.struct import NA, to_builtins
from turbofit.machine.snapshot import load_snapshot, save_snapshot
from turbofit.machine.spec import parse_spec


@pytest.fixture
def machine() -> Machine:
    return parse_spec("2xrtx3090:used=1GiB+l4,nvlink=0-1,ram=64GiB")


def test_round_trip(tmp_path: Path, machine: Machine):
    path = tmp_path / "machine.json"
    save_snapshot(machine, path)
    loaded = load_snapshot(path)
    assert loaded.source == f"snapshot {path}"
    assert msgspec.structs.replace(loaded, source=machine.source) == machine
    assert os.listdir(tmp_path) == ["machine.json"]


def test_na_survives(tmp_path: Path, machine: Machine):
    lost = msgspec.structs.replace(machine.gpus[0], total=NA, reserved=NA, used=NA, free=NA)
    machine = msgspec.structs.replace(machine, gpus=(lost, *machine.gpus[1:]))
    save_snapshot(machine, tmp_path / "m.json")
    assert load_snapshot(tmp_path / "m.json").gpus[0].total == NA


def test_another_schema_names_both(tmp_path: Path, machine: Machine):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**to_builtins(machine), "schema": "turbofit.machine/9"}))
    with pytest.raises(UsageError, match=r"turbofit\.machine/9.*turbofit\.machine/1"):
        load_snapshot(path)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[1, 2]", "cannot be read"),
        ("null", "cannot be read"),
        ('{"gpus": []}', "has schema 'none'"),
        ('{"schema": 7}', "cannot be read"),
        ('{"schema": "turbofit.machine/1"}', "missing required field"),
        ("[" * 100_000, "cannot be read"),
        ("\xff\xfe", "cannot be read"),
    ],
)
def test_not_a_snapshot(tmp_path: Path, text: str, cause: str):
    path = tmp_path / "m.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=cause) as caught:
        load_snapshot(path)
    assert caught.value.hint


def _card(bandwidth: float, flops: float) -> dict[str, object]:
    return {"torch": "2", "cards": [{"index": 0, "bandwidth": bandwidth, "flops": flops}]}


def _reduce(seconds: float) -> dict[str, object]:
    one = {"gpus": [0, 1], "size": 1024, "seconds": seconds, "right": True}
    return {"torch": "2", "reduces": [one]}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda m: m.update(gpus=[], links=[], visible=[]), "no GPU"),
        (lambda m: m["gpus"][1].update(index=0), "one index"),
        (lambda m: m.update(visible=[0, 7]), "visible"),
        (lambda m: m.update(visible=[0, 0]), "visible"),
        (lambda m: m["gpus"][0].update(free=-1), "size"),
        (lambda m: m["gpus"][0].update(total=2**63), "size"),
        (lambda m: m["gpus"][0].update(free=2**40), "more than it has"),
        (lambda m: m["gpus"][0].update(sm_count=0), "speed"),
        (lambda m: m["gpus"][0].update(pcie={"generation": 5000, "width": 16}), "speed"),
        (lambda m: m["gpus"][0].update(pcie={"generation": 3, "width": -1}), "speed"),
        (lambda m: m.update(measured=_card(0.0, 1e12)), "measured"),
        (lambda m: m.update(measured=_card(1e12, -1.0)), "measured"),
        (lambda m: m.update(measured=_reduce(0.0)), "measured"),
        (lambda m: m["gpus"][0].update(name="\x1b[2J"), "unprintable"),
        (lambda m: m.update(driver="\x07"), "unprintable"),
        (lambda m: m["links"][0].update(a=1, b=0), "links"),
        (lambda m: m["links"][0].update(b=9), "links"),
        (lambda m: m["links"].append(m["links"][0]), "links"),
        (lambda m: m["host"].update(ram_available=-5), "host"),
    ],
)
def test_impossible_machines(tmp_path: Path, machine: Machine, change, cause: str):
    data = to_builtins(machine)
    data = json.loads(json.dumps(data))
    change(data)
    path = tmp_path / "m.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=cause):
        load_snapshot(path)


def test_files_that_are_not_files(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing.json", "/dev/zero", "a\x00b.json"):
        with pytest.raises(UsageError):
            load_snapshot(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a file"):
        load_snapshot(tmp_path / "pipe")


def test_too_large(tmp_path: Path):
    path = tmp_path / "m.json"
    with path.open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(UsageError, match="larger than"):
        load_snapshot(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
_PATHS = st.sampled_from(
    [("gpus",), ("gpus", 0), ("gpus", 0, "total"), ("gpus", 0, "free"), ("gpus", 0, "index"),
     ("gpus", 0, "pcie"), ("gpus", 0, "holders"), ("gpus", 0, "compute_capability"), ("links",),
     ("links", 0, "a"), ("links", 0, "nvlinks"), ("host",), ("visible",), ("name",), ("driver",)]
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=_PATHS, value=_JSON)
def test_fuzzed_snapshots(tmp_path: Path, machine: Machine, where, value):
    data = json.loads(json.dumps(to_builtins(machine)))
    node = data
    for step in where[:-1]:
        node = node[step]
    node[where[-1]] = value
    path = tmp_path / "m.json"
    path.write_text(json.dumps(data))
    try:
        loaded = load_snapshot(path)
    except UsageError:
        return
    assert loaded.visible
    assert {gpu.index for gpu in loaded.gpus} >= set(loaded.visible)
