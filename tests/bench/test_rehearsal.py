"""The rows of `bench/rehearsal`: the formula against LMDeploy's own engine."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

if importlib.util.find_spec("lmdeploy") is None:
    pytest.skip("needs LMDeploy", allow_module_level=True)
if shutil.which("cc") is None:
    pytest.skip("needs a C compiler", allow_module_level=True)

from bench.rehearsal.grid import ROWS
from bench.rehearsal.run import check_row
from turbofit.model.presets import preset_model
from turbofit.rehearsal.pretend.run import NOTICE

pytestmark = pytest.mark.lmdeploy
#: Rows whose miss `bench/rehearsal/RESULTS.md` names.
MISSED = (
    "intern-s1-mini tp1 1xrtx3090 cache_max_entry_count=0.5",
    "internvl2-8b tp1 1xrtx3090 cache_max_entry_count=0.9",
)
MISS = pytest.mark.xfail(strict=True, reason="a miss that is published")
GRID = [pytest.param(row, id=row.name, marks=[MISS] * (row.name in MISSED)) for row in ROWS]


def test_the_grid_has_models_of_experts():
    assert sum(preset_model(row.model).text.moe is not None for row in ROWS) >= 8


@pytest.mark.exhaustive  # the check rehearses in `tests/rehearsal`, and serves with tp in `launch`
@pytest.mark.parametrize("row", GRID)
def test_forecast_and_engine_agree(row, tmp_path):
    checks, seen = check_row(row, tmp_path)
    assert checks
    assert [(c.what, c.forecast, c.seen) for c in checks if c.bad] == []
    assert seen["pretend"] == NOTICE
