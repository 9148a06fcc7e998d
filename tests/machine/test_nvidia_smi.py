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


def test_a_list_with_another_line_is_asked_back():
    with pytest.raises(UsageError, match="line 2 is of no GPU") as refusal:
        parse_spec("GPU 0: NVIDIA L4 (UUID: GPU-7f31)\nNVIDIA L4")
    assert "`nvidia-smi -L`" in (refusal.value.hint or "")


QUERIES = [
    (
        "utilization.gpu [%], memory.total [MiB], memory.used [MiB], name",
        "7 %, 23034, 1024, NVIDIA L4",
    ),
    ("index, name, memory.total [MiB], memory.used [MiB]", "0, NVIDIA L4, 23034 MiB, 1024 MiB"),
    ("memory.free [MiB], memory.total [MiB], name", "21535, 23034, NVIDIA L4"),
    ("name, memory.total [MiB], memory.used [MiB]", "NVIDIA L4, 23034 MiB, 1024 MiB"),
]


@pytest.mark.parametrize("lines", QUERIES)
def test_the_answer_to_a_query_is_read_by_its_first_line(lines: tuple[str, str]) -> None:
    (gpu,) = parse_spec("\n".join(lines)).gpus
    assert (gpu.name, gpu.used) == ("NVIDIA L4", 1024 * MIB)
    assert len(parse_spec("\n".join((*lines, lines[1]))).gpus) == 2


@pytest.mark.parametrize(
    ("named", "total", "said", "free"),
    [
        ("NVIDIA GeForce RTX 3090", 24576, 24150, 24126),  # more than with the preset's driver
        ("NVIDIA GeForce RTX 3090", 24576, 24000, 24000),
        ("NVIDIA GeForce RTX 3090", 24576, 1, 1),
        ("NVIDIA GeForce RTX 3090", 24576, 0, 0),
        ("NVIDIA Unlisted 5", 24576, 24150, 22118),  # nine tenths of a card without a preset
    ],
)
def test_free_memory_is_what_cuda_can_still_hand_out(named, total, said, free) -> None:
    first = "name, memory.total [MiB], memory.used [MiB], memory.free [MiB]"
    for used, line in ((12, first), (12, first.replace("memory.used", "memory.reserved"))):
        (card,) = parse_spec(f"{line}\n{named}, {total} MiB, {used} MiB, {said} MiB").gpus
        assert int(card.free) // MIB == free
        assert card.used + card.free == card.total - card.reserved


@pytest.mark.parametrize("keys", ["free=23035MiB", "total=9GiB:free=10GiB"])
def test_free_memory_above_the_printed_or_given_total_is_refused(keys: str) -> None:
    with pytest.raises(UsageError, match="more than the"):
        parse_spec(f"NVIDIA L4 23034 MiB:{keys}")


def test_a_full_card_has_nothing_free() -> None:
    lines = "name, memory.total [MiB], memory.used [MiB]\nNVIDIA L4, 23034 MiB, 22900 MiB"
    assert parse_spec(lines).gpus[0].free == 0


def test_a_query_without_names_is_asked_back() -> None:
    with pytest.raises(UsageError, match="names no card") as caught:
        parse_spec("memory.total [MiB], memory.used [MiB]\n24576 MiB, 0 MiB")
    assert "--query-gpu=name" in caught.value.hint
