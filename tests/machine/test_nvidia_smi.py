"""What nvidia-smi prints, as a machine: its memory in use is held by others."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.units import MIB
from turbofit.machine.spec import parse_spec

TABLE = """\
| NVIDIA-SMI 570.86.15              Driver Version: 570.86.15      CUDA Version: 12.8     |
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|   0  NVIDIA GeForce RTX 4090        On  |   00000000:01:00.0 Off |                  N/A |
| 30%   34C    P8             20W /  450W |    1843MiB /  24564MiB |      0%      Default |
|   1  NVIDIA GeForce RTX 4090        Off |   00000000:02:00.0 Off |                    0 |
| N/A   34C    P8              9W /  450W |       0MiB /  24564MiB |      0%      Default |
|    0   N/A  N/A            1234      G   /usr/lib/xorg/Xorg                       900MiB |
"""


def test_a_tables_memory_in_use_is_held_by_others_and_said():
    machine = parse_spec(TABLE)
    assert machine.gpus == parse_spec("rtx4090:used=1843MiB+rtx4090").gpus
    assert machine.warnings == ("GPU 0: 1.8 GiB are held by others, as the pasted nvidia-smi says",)


V100 = "index, name, memory.total [MiB], memory.used [MiB], memory.free [MiB]\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{V100}0, Tesla V100-SXM2-32GB, 32768 MiB, 3114 MiB, 29379 MiB\n"
        "1, Tesla V100-SXM2-32GB, 32768 MiB, 0 MiB, 32493 MiB\n",
        "memory.used [MiB],name\n3114,Tesla V100-SXM2-32GB\n0,Tesla V100-SXM2-32GB\n",
        "$ nvidia-smi --query-gpu=index,name,memory.used --format=csv\n"
        "index, name, memory.used [MiB]\n"
        "0, Tesla V100-SXM2-32GB, 3114 MiB\n1, Tesla V100-SXM2-32GB, 0 MiB\n",
    ],
)
def test_of_a_csv_the_first_line_says_what_a_column_is(text: str):
    machine = parse_spec(text)
    assert [gpu.used for gpu in machine.gpus] == [3114 * MIB, 0]
    assert machine.gpus == parse_spec("v100-32g:used=3114MiB+v100-32g").gpus


@pytest.mark.parametrize(
    "text",
    [
        "0, Tesla V100-SXM2-32GB, 32768 MiB, 3114 MiB",
        "Tesla V100-SXM2-32GB, 32768 MiB",
    ],
)
def test_sizes_that_nothing_names_are_asked_back(text: str):
    with pytest.raises(UsageError, match="a size without a first line") as refusal:
        parse_spec(f"{text}\n{text}\n")
    assert "--query-gpu=index,name,memory.total,memory.used" in (refusal.value.hint or "")
    with pytest.raises(UsageError, match="line 2 is of no GPU"):
        parse_spec("GPU 0: NVIDIA L4 (UUID: GPU-7f31)\nNVIDIA L4")
    with pytest.raises(UsageError, match="line 2 has 2 columns, and the first has 5"):
        parse_spec(f"{V100}0, Tesla V100-SXM2-32GB\n")
