from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Machine
from turbofit.core.struct import NA, to_json
from turbofit.core.units import GIB
from turbofit.machine.source import load_snapshot, machine_from, save_snapshot
from turbofit.machine.spec import parse_spec


@pytest.mark.parametrize("name", ["m.json", "./m", "sub/m"])
def test_a_path_is_a_snapshot(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    save_snapshot(parse_spec("2xl4"), name)
    assert machine_from(name).source == f"snapshot {name}"


def test_a_pasted_line_is_a_card_whatever_slashes_it_has():
    line = "|   0  NVIDIA GeForce RTX 3090   On  | 00000000:01:00.0 Off / On |      N/A |"
    assert machine_from(line).gpus == machine_from("rtx3090").gpus


TABLE = """\
| NVIDIA-SMI 570.86.15              Driver Version: 570.86.15      CUDA Version: 12.8     |
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|   0  NVIDIA GeForce RTX 3090        On  |   00000000:01:00.0 Off |                  N/A |
| 30%   34C    P8             20W /  350W |       1MiB /  24576MiB |      0%      Default |
|   1  NVIDIA L4                      Off |   00000000:02:00.0 Off |                    0 |
| N/A   34C    P8              9W /   72W |       1MiB /  23034MiB |      0%      Default |
|    0   N/A  N/A            1234      C   python3                                 400MiB |
"""


def test_of_a_pasted_table_the_cards_are_read_and_laptops_cards_are_not_those_of_desks():
    assert machine_from(TABLE).gpus == machine_from("rtx3090:used=1MiB+l4:used=1MiB").gpus
    with pytest.raises(UsageError, match="a laptop's card"):
        machine_from("NVIDIA GeForce RTX 4060 Max-Q")


def test_gpus_of_a_machine_that_is_there():
    machine = machine_from("2xl4+a100", environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert machine.visible == (0, 1, 2)  # of what is described, the environment hides nothing
    chosen = machine_from(machine, gpus="2,0")
    assert (chosen.visible, machine_from(chosen, gpus="2").visible) == ((2, 0), (2,))
    for entry in ("3", "no-such", "2,2"):
        with pytest.raises(UsageError):
            machine_from(machine, gpus=entry)
    with pytest.raises(UsageError, match="hidden"):
        machine_from(chosen, gpus="1")
    blank = replace(machine, visible=())
    assert machine_from(blank).visible == (0, 1, 2)
    lost = replace(machine.gpus[0], total=NA, reserved=NA, used=NA, free=NA)
    blank = replace(machine, gpus=(lost, *machine.gpus[1:]))
    assert machine_from(blank).visible == (1, 2)


@pytest.mark.parametrize("used", [NA, 0])
def test_memory_that_nobody_accounts_for_is_used(tmp_path: Path, used):
    machine = machine_from("1xl4")
    (gpu,) = machine.gpus
    less = replace(machine, gpus=(replace(gpu, used=used, free=5 * GIB),))
    save_snapshot(less, tmp_path / "m.json")
    for on in (less, str(tmp_path / "m.json")):
        assert machine_from(on).gpus[0].used == gpu.usable - 5 * GIB
    # A reserve that counts as used is not counted twice.
    old = (replace(gpu, reserved=NA, used=gpu.total - 5 * GIB, free=5 * GIB),)
    assert machine_from(replace(machine, gpus=old)).gpus == old


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


def _rated(machine: Any, **wrong: float) -> dict[str, object]:
    """A calibration with one rate of the machine's cards."""
    rate = {"of": "bandwidth", "value": 1e11, "spread": 0.1, **wrong}
    words = ("model", "engine", "engine_version", "lmdeploy", "driver", "communicator", "when")
    steps = {"quant_policy": 0, "points": [], "rates": [rate]}
    cards = [machine["gpus"][0]["name"]]
    return {**dict.fromkeys(words, ""), "gpus": cards, "context": 0, "buffers": 0, "steps": steps}


REDUCE = {"gpus": [0, 1], "size": 1024, "seconds": 0.0, "right": True}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda m: m.update(gpus=[], links=[], visible=[]), "no GPU"),
        (lambda m: m["gpus"][1].update(index=0), "one index"),
        (lambda m: m.update(visible=[0, 7]), "visible"),
        (lambda m: m.update(visible=[0, 0]), "visible"),
        (lambda m: m["gpus"][0].update(free=-1), "cannot be read"),
        (lambda m: m["gpus"][0].update(total=2**63), "cannot be read"),
        (lambda m: m["gpus"][0].update(free=2**40), "more than it has"),
        (lambda m: m["gpus"][0].update(sm_count=0), "cannot be read"),
        (lambda m: m.update(measured=_cards(flops=-1.0)), "cannot be read"),
        (lambda m: m.update(measured=_cards(bandwidth=0.0)), "cannot be read"),
        (lambda m: m.update(measured={"torch": "2", "reduces": [REDUCE]}), "cannot be read"),
        (lambda m: m["gpus"][0].update(name="\x1b[2J"), "unprintable"),
        (lambda m: m.update(driver="\x07"), "unprintable"),
        (lambda m: m["links"][0].update(a=1, b=0), "links"),
        (lambda m: m["links"][0].update(b=9), "links"),
        (lambda m: m["links"].append(m["links"][0]), "links"),
        (lambda m: m["host"].update(ram_available=-5), "cannot be read"),
        (lambda m: m.update(calibrations=[_rated(m, value=1e15)]), "above its card's peak"),
        (lambda m: m.update(calibrations=[_rated(m, value=-1.0)]), "cannot be read"),
        (lambda m: m.update(calibrations=[_rated(m, spread=1.5)]), "cannot be read"),
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
