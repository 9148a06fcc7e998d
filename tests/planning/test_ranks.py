from __future__ import annotations

import pytest

from turbofit.planning.ranks import rank_warning


@pytest.mark.parametrize(
    ("tp", "environ", "warned"),
    [
        (4, {"WORLD_SIZE": "4"}, "4 whole engines"),
        (2, {"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
        (4, {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "WORLD_SIZE=4"),
        (4, {"WORLD_SIZE": "1"}, None),
        (1, {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, None),
        (4, {}, None),
        (4, {"WORLD_SIZE": "x"}, None),
    ],
)
def test_rank_launchers(tp: int, environ: dict[str, str], warned: str | None) -> None:
    warning = rank_warning(tp, environ)
    assert (warning is None) == (warned is None)
    if warned is not None:
        assert warning is not None
        assert warned in warning
