from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.struct import NA
from turbofit.core.units import GIB
from turbofit.machine.snapshot import save_snapshot
from turbofit.machine.source import machine_from
from turbofit.machine.spec import parse_spec


@pytest.mark.parametrize("name", ["m.json", "./m", "sub/m"])
def test_a_path_is_a_snapshot(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    save_snapshot(parse_spec("2xl4"), name)
    assert machine_from(name).source == f"snapshot {name}"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("|   0  NVIDIA GeForce RTX 3090   On  | 00000000:01:00.0 Off |      N/A |", "rtx3090"),
        ("3b:00.0 3D controller: NVIDIA Corporation GA102GL [A10/A10G] (rev a1)", "a10"),
        ("01:00.0 VGA compatible controller: NVIDIA Corporation TU102 [GeForce RTX 2080 Ti Rev. A]"
         " (rev a1)", "rtx2080ti"),
        ("01:00.0 VGA compatible controller [0300]: NVIDIA Corporation GA104 [GeForce RTX 3070 Lite"
         " Hash Rate] [10de:2488] (rev a1)", "rtx3070"),
    ],
)  # fmt: skip
def test_a_pasted_line_is_a_card_whatever_slashes_it_has(line: str, name: str):
    assert machine_from(line).gpus == machine_from(name).gpus


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
    assert machine_from(TABLE).gpus == machine_from("rtx3090+l4").gpus
    with pytest.raises(UsageError, match="of laptops"):
        machine_from("01:00.0 VGA: NVIDIA Corporation AD107M [GeForce RTX 4060 Max-Q / Mobile]")


def test_gpus_of_a_machine_that_is_there():
    machine = machine_from("2xl4+a100", environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert machine.visible == (0, 1, 2)  # of what is described, the environment hides nothing
    chosen = machine_from(machine, gpus="2,0")
    assert chosen.visible == (2, 0)
    assert machine_from(chosen, gpus="2").visible == (2,)
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
