"""The search of `tune` on simulated engines whose tokens a second are published curves."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from tests.measure.tune.test_search import SEEN
from tests.sweep import sweep
from turbofit.measure.tune.search import order
from turbofit.measure.tune.space import MeanRequest, TrialChoice, choices
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

pytestmark = pytest.mark.slow

#: Those of Llama-2-7B; bench/tune/RESULTS.md has all of them.
CURVES = [
    curve
    for curve in yaml.safe_load(Path(__file__).with_name("published_curves.yaml").read_text())
    if curve["model"] == "llama-2-7b"
][:4]
#: Requests a second with int8 and int4 KV over those with 16 bits: LMDeploy's docs/en/quantization/
#: kv_quant.md (Llama2-7B, InternLM2-7B), and its PyTorch engine's for a KV type of its own.
KV_GAINS = ((19.01 / 14.98, 20.81 / 14.98), (25.28 / 24.13, 25.8 / 24.13), (9.96 / 10.74,) * 2)
NOISE = 0.03


class Engine:
    """What a choice serves, and what a load measures of it; a seed draws what nobody published."""

    def __init__(self, curve: dict[str, Any], seed: int) -> None:
        self.draw = random.Random(f"{curve['name']} {seed}")
        self.curve = curve
        self.slope, self.bend = self.draw.gauss(0, 0.04), self.draw.gauss(0, 0.02)
        self.gains = dict(zip((8, 4), self.draw.choice(KV_GAINS), strict=True))

    def truth(self, choice: TrialChoice) -> float:
        settings, curve = choice.plan.settings, self.curve
        held = max(1, choice.plan.kv.tokens // (curve["prompt"] + curve["output"]))
        doublings = math.log2(settings.max_prefill_token_num / 4096)
        prefill = math.exp(self.slope * doublings + self.bend * doublings**2)
        rows = min(settings.max_batch_size, held)
        tokens = between(rows, sorted(curve["points"].items()))
        return tokens / curve["output"] * prefill * self.gains.get(settings.quant_policy, 1.0)

    def measured(self, choice: TrialChoice) -> Any:
        rate = self.truth(choice) * math.exp(self.draw.gauss(0, NOISE))
        return replace(SEEN, requests_per_second=rate, e2e_p50=1 / rate)


def between(rows: float, points: list[tuple[int, float]]) -> float:
    """Tokens a second, between the points by logarithms."""
    for (low, less), (high, more) in pairwise(points):
        if low <= rows <= high:
            return less * (more / less) ** (math.log(rows / low) / math.log(high / low))
    return points[0][1] if rows < points[0][0] else points[-1][1]


def misled(found: list[TrialChoice], seed: int) -> list[TrialChoice]:
    """What is searched, with forecasts that are wrong on purpose."""
    draw = random.Random(f"forecast {seed}")
    every, each = draw.gauss(0, 0.5), draw.gauss(0, 0.1)
    choices = []
    for choice in found:
        wrong = math.exp(every + each * math.log2(choice.plan.settings.max_batch_size))
        forecast = replace(choice.forecast, requests_per_second=choice.rate * wrong)
        choices.append(choice._replace(forecast=forecast))
    return choices


def test_six_starts_come_near_the_best_of_the_whole_grid() -> None:
    assert len(CURVES) == 4
    for curve in sweep(CURVES, 2):
        request = PlanRequest(model="llama-2-7b", on=curve["machine"], engine="turbomind", images=0)
        mean, at_once = MeanRequest(curve["prompt"], curve["output"], ()), max(curve["points"])
        found = choices(request, plan(request), mean, at_once, (0, 8, 4))
        shares = []
        for seed in range(20):
            engine, wrong = Engine(curve, seed), misled(found, seed)
            tried = [wrong[0], *order(wrong[1:], None, {}, at_once)[:5]]
            best = max(tried, key=lambda one: engine.measured(one).requests_per_second)
            shares.append(engine.truth(best) / max(map(engine.truth, found)))
        assert median(shares) >= 0.98, curve["name"]
