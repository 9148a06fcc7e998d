from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu
from turbofit.machine.visible import cuda_visible, select

ORDINALS = (0, 1, 2, 3)
IDS = {
    "GPU-aa11": 0, "GPU-aa22": 1, "GPU-bb33": 2,
    "MIG-cc44": 4, "MIG-GPU-dd55/1/0": 4, "MIG-cc55": 5,
}  # fmt: skip
GPUS = tuple(
    Gpu(index=index, uuid=name, name="X", total=1, reserved=0, used=0, free=1)
    for name, index in IDS.items()
    if "/" not in name
)


@pytest.mark.parametrize(
    ("value", "seen", "warns"),
    [
        ("  ", (), False),
        (" 3 , 1 ", (3, 1), False),
        ("0,9,1", (0,), True),
        ("1,", (1,), True),
        ("NoDevFiles", (), True),
        ("1gpu2,2ampere", (1, 2), False),
        ("0,0", (), True),
        ("GPU-bb33,GPU-aa11", (2, 0), False),
        ("GPU-aa", (), True),
        ("GPU-bb,0", (2,), True),
        ("0,GPU-bb", (0,), True),
        ("GPU-bb,GPU-bb33", (), True),
        ("MIG-cc44,MIG-cc55", (4, 5), False),
        ("MIG-GPU-dd55/1/0", (4,), False),
        ("99999999999999999999", (), True),
    ],
)
def test_cuda_semantics(value: str, seen: tuple[int, ...], warns: bool):
    visible, warning = cuda_visible(value, ORDINALS, IDS)
    assert visible == seen
    assert (warning is not None) == warns


@given(st.text(max_size=30) | st.lists(st.integers(-2, 6)).map(lambda v: ",".join(map(str, v))))
def test_any_value_gives_distinct_known_gpus(value: str):
    visible, _ = cuda_visible(value, ORDINALS, IDS)
    assert len(set(visible)) == len(visible)
    assert set(visible) <= {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("gpus", "chosen"),
    [
        ("all", (0, 1, 2, 4)),
        ("2, 0", (2, 0)),
        ("gpu-BB,1", (2, 1)),
        ("MIG-cc44", (4,)),
    ],
)
def test_select(gpus: str, chosen: tuple[int, ...]):
    assert select(gpus, GPUS, (0, 1, 2, 4)) == chosen


@pytest.mark.parametrize(
    ("gpus", "cause"),
    [
        ("7", "not one GPU"),
        ("GPU-", "not one GPU"),
        ("GPU-aa", "not one GPU"),
        ("-1", "not one GPU"),
        ("0,", "not one GPU"),
        ("0,GPU-aa11", "twice"),
        ("5", "hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_select_refuses(gpus: str, cause: str):
    with pytest.raises(UsageError, match=cause) as caught:
        select(gpus, GPUS, (0, 1, 2, 4))
    assert caught.value.hint
