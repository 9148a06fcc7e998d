"""Bent bodies over all routes: nothing of ours breaks, nothing past the limits goes on.

``bench/gateway/fuzz.py`` runs many more of the same.
"""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.gateway.judge import images_of, units_reaching
from tests.gateway.mutations import Mutator
from tests.gateway.support import PATCHES, TILES, call, gateway, plan_for
from turbofit.gateway.limits import model_default

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.mark.parametrize("overlay", [True, False])
@pytest.mark.parametrize(
    ("rule", "limits"),
    [(TILES, {"limit": 12}), (TILES, {"limit": 4}), (PATCHES, {"limit": 1_003_520})],
)
def test_nothing_past_the_limits_goes_on(rule, limits, overlay) -> None:
    passed, refused = asyncio.run(run(rule, limits, overlay=overlay, count=700, seed=11))
    assert passed > 60
    assert refused > 60


async def run(rule, limits, *, overlay, count, seed):
    """Counts of what was passed on and refused; anything wrong fails."""
    plan = plan_for(rule, **limits)
    app, recorder = gateway(plan, overlay=overlay)
    mutator, passed, refused = Mutator(seed), 0, 0
    default = model_default(app.bounds)
    for _ in range(count):
        path, raw = mutator.request()
        before = len(recorder.seen)
        reply = await call(app, path, raw=raw, method="POST")
        assert reply.status < 500, (reply.status, raw[:300])
        if len(recorder.seen) == before:
            assert reply.status >= 400, raw[:300]
            refused += 1
            continue
        passed += 1
        judge(rule, plan.limits, default, path, recorder.seen[-1][3])
    assert all(engine.units == engine.host_bytes == 0 for engine in app.engines)
    return passed, refused


def judge(rule, limits, default, path, raw) -> None:
    """The body as LMDeploy would read it is within the limits."""
    body = msgspec.json.decode(raw)
    images = images_of(path, body)
    counts = [units_reaching(rule, default, size, params) for size, params in images]
    assert len(counts) <= limits.units_per_request
    assert all(count <= limits.units_per_image for count in counts), (counts, images)
    assert sum(counts) <= limits.units_per_request
    assert (body.get("n") or 1) <= (limits.n if images else 128)
