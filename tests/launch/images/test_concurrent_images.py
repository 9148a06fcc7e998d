"""Images that many threads prepare meet in one forward: what is in use stays within the plan."""

from __future__ import annotations

import itertools
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.processes import Child
from tests.support.serving import image, needs, serve_pretend
from turbofit.core.plan import Plan
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.launch.engine.pretended import PretendReader

pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow]
needs("lmdeploy", "fastapi", "torchvision")

#: One whose images are queued; others, some of whose forwards have room for all that can meet.
_HELD = [("internvl2-2b", "1xrtx3090")]
_MORE = [
    ("qwen2-vl-7b", "1xrtx4090"),
    ("internvl2-8b", "1xrtx3090"), ("internvl3-8b", "1xrtx4090"), ("internvl2.5-4b", "1xrtx3060"),
    ("qwen2-vl-2b", "1xrtx3060"), ("qwen2.5-vl-7b", "1xrtx4090"), ("qwen3.5-4b", "1xrtx4090"),
]  # fmt: skip
_MODELS = [*_HELD, *(pytest.param(*row, marks=pytest.mark.exhaustive) for row in _MORE)]
#: The largest that a request may have, what is cut at a chunk's edge, and the smallest.
_SIZES = [(4480, 2688), (448, 448), (5376, 448), (28, 28), (1344, 896), (800, 3000)]
_CLIENTS = 8
_REQUESTS = 24


@pytest.mark.parametrize(("model", "on"), _MODELS)
def test_what_meets_is_within_the_plan(
    children: list[Child], tmp_path: Path, model: str, on: str
) -> None:
    """With the images of many clients at once, of all sizes, between prompts of many lengths."""
    served = serve_pretend(children, tmp_path, model, "--on", on, "--image-threads", "8")
    served.wait()
    plan = Plan.from_json((served.run / "plan.json").read_bytes())
    bounds, memory = bounds_of(plan), plan.host
    if memory.available is not None:  # images in flight have a bound of their own
        assert memory.pinned + memory.pageable + bounds.host_bytes <= memory.available

    def ask(number: int) -> int:
        many = 1 + number % 3
        sizes = itertools.islice(itertools.cycle(_SIZES), number, number + many)
        text = {"type": "text", "text": "x" * (number * 61 % 700)}
        return served.chat(text, *(image(*size) for size in sizes), max_tokens=4)[0]

    with ThreadPoolExecutor(_CLIENTS) as clients:
        answers = list(clients.map(ask, range(_REQUESTS)))
    assert set(answers) <= {200, 429}  # a slow host keeps some waiting for too long
    assert answers.count(200) > _CLIENTS
    assert served.chat()[0] == 200
    log = (served.run / "engine-0.log").read_text(errors="replace")
    assert "turbofit: images: prepared on 8 threads" in log
    met = [int(units) for units in re.findall(r"images_batched=\d+ .* patches=(\d+)", log)]
    assert max(met) <= plan.limits.units_per_forward

    timeline = served.run / "pretend-0" / "0-0" / "timeline"
    (usage,), (ledger,) = PretendReader(plan, 0, timeline).usages(), plan.gpus
    assert usage.peak <= ledger.most
    assert usage.pool is not None
    pools = [t.bytes for t in ledger.ledger if t.phase == "transient" or t.term == "pool_warmup"]
    assert usage.pool <= max(pools)
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.finish() == 0
