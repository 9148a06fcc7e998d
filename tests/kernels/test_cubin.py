import pytest

from tests.kernels.device_code import (
    BRA,
    CODE,
    EMPTY,
    EXIT,
    EXIT_IF,
    FFMA,
    LDC,
    MOV,
    NOP,
    SHFL,
    cubin,
)  # fmt: skip
from turbofit.kernels.device_code import functions


def test_functions_by_name() -> None:
    data = cubin({"full": CODE, "hollow": EMPTY})
    assert list(functions(data)) == [("full", False), ("hollow", True)]


@pytest.mark.parametrize(
    ("body", "empty"),
    [
        ((MOV, EXIT, BRA), True),
        ((LDC, EXIT, BRA, NOP, NOP), True),
        ((MOV, SHFL, EXIT, BRA), True),  # Volta's
        ((MOV, FFMA, EXIT), False),
        ((MOV, EXIT_IF, EXIT), False),
        ((MOV, BRA), False),
        ((), False),
    ],
)
def test_what_is_empty(body: tuple[int, ...], empty: bool) -> None:
    assert [empty for _, empty in functions(cubin({"kernel": body}))] == [empty]
