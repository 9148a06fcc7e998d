"""The longest context is the one that halving finds, with fewer looks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from turbofit.tuner.search.context import CONTEXT_STEP, longest_held


def by_halving(holds, low: int, high: int) -> int:
    while high - low > CONTEXT_STEP:
        middle = (low + high) // 2 // CONTEXT_STEP * CONTEXT_STEP
        if middle <= low:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@given(
    room=st.integers(0, 200_000), cost=st.floats(0, 2), step=st.integers(1, 500),
    starts_to=st.integers(1024, 140_000), high=st.integers(1024, 131_072).map(lambda n: n & ~63),
)  # fmt: skip
def test_it_is_what_halving_finds(room, cost, step, starts_to, high) -> None:
    looks = []

    def held(context: int) -> int:
        """Fewer tokens in steps the longer the context is; none where the engine does not start."""
        looks.append(context)
        tokens = max(0, int(room - cost * context)) // step * step
        return tokens if context <= starts_to else 0

    low = 1024
    if held(low) < low or held(high) >= high:
        return
    looks.clear()
    assert longest_held(held, low, high) == by_halving(lambda n: held(n) >= n, low, high)


def test_two_looks_do_where_a_context_costs_little() -> None:
    looks = []

    def held(context: int) -> int:
        looks.append(context)
        return 20_000 - context // 1000

    assert longest_held(held, 1024, 32_768) == 19_968
    assert looks == [32_768, 19_968]
