from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.core.struct import to_json
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


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "cannot be read"),
        ('{"gpus": []}', "has schema 'none'"),
        ('{"schema": 7}', "cannot be read"),
        ('{"schema": "turbofit.machine/1"}', "missing required field"),
        ('{"schema": "turbofit.machine/9"}', r"turbofit\.machine/9.*turbofit\.machine/1"),
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


def _cards(**wrong: float) -> dict[str, object]:
    return {"torch": "2", "cards": [{"index": 0, "bandwidth": 1e12, "flops": 1e12, **wrong}]}


REDUCE = {"gpus": [0, 1], "size": 1024, "seconds": 0.0, "right": True}


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
        (lambda m: m.update(measured=_cards(flops=-1.0)), "measured"),
        (lambda m: m.update(measured=_cards(bandwidth=0.0)), "measured"),
        (lambda m: m.update(measured={"torch": "2", "reduces": [REDUCE]}), "measured"),
        (lambda m: m["gpus"][0].update(name="\x1b[2J"), "unprintable"),
        (lambda m: m.update(driver="\x07"), "unprintable"),
        (lambda m: m["links"][0].update(a=1, b=0), "links"),
        (lambda m: m["links"][0].update(b=9), "links"),
        (lambda m: m["links"].append(m["links"][0]), "links"),
        (lambda m: m["host"].update(ram_available=-5), "host"),
    ],
)
def test_impossible_machines(tmp_path: Path, machine: Machine, change, cause: str):
    data = json.loads(to_json(machine))
    change(data)
    path = tmp_path / "m.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=cause):
        load_snapshot(path)


def test_files_that_are_not_files_or_too_large(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing.json", "/dev/zero", "a\x00b.json"):
        with pytest.raises(UsageError):
            load_snapshot(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a file"):
        load_snapshot(tmp_path / "pipe")
    with (tmp_path / "m.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(UsageError, match="larger than"):
        load_snapshot(tmp_path / "m.json")
