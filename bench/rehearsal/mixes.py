"""The worst mix of images beside equal largest ones, on LMDeploy's PyTorch engine."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from turbofit import api
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.rehearse.torch.torch_planned import beside, planned_scenario, planned_spec
from turbofit.rehearse.torch.torch_report import torch_report
from turbofit.rehearse.torch.torch_run import run_torch
from turbofit.rehearse.torch.torch_spec import TorchCase, TorchSpec

TITLES = ("row", "images of a mix", "forecast", "equal", "mix", "equal of forecast", "mix of it")
_CASE = "vision_forward"


class MixRow(NamedTuple):
    """A plan: a model and its options."""

    model: str
    options: Mapping[str, Any] = MappingProxyType({})
    on: str = "1xrtx3060"

    @property
    def name(self) -> str:
        """A short name for the table."""
        return " ".join([self.model, *(f"{key}={value}" for key, value in self.options.items())])


_LARGE = {"max_prefill_token_num": 8192, "max_batch_size": 8}
_SIZED = {**_LARGE, "image_size": (1344, 1568)}
ROWS = (
    MixRow("internvl2-1b", _LARGE),
    MixRow("internvl2-1b", {**_LARGE, "images": 3}),
    MixRow("internvl2-1b", {**_LARGE, "enable_prefix_caching": True}),
    MixRow("qwen2-vl-2b", _SIZED),
    MixRow("qwen2-vl-2b", {**_SIZED, "max_prefill_token_num": 4096}),
    MixRow("qwen2-vl-2b", {**_SIZED, "images": 2}),
    MixRow("qwen2-vl-2b", {**_SIZED, "enable_prefix_caching": True}),
)


class Found(NamedTuple):
    """A line of the table, and whether the mix was no less than equal images nor above the plan."""

    line: tuple[str, ...]
    kept: bool


def compare(row: MixRow) -> Found:
    """The engine with equal largest images, then with the mix."""
    plan = api.plan(row.model, on=row.on, engine="pytorch", **dict(row.options))
    rule = plan.model.image_rule
    assert rule is not None
    (forecast,) = (term.bytes for term in plan.gpus[0].ledger if term.term == _CASE)
    with tempfile.TemporaryDirectory() as scratch:
        spec = planned_spec(plan, Path(scratch))
        cases = {case.name: case for case in spec.cases}
        whole, mix = cases["vision_request"], cases[_CASE]
        equal = TorchCase(_CASE, whole.requests * _count(plan))
        before, after = (_seen(plan, spec, whole, case) for case in (equal, mix))
    sent = [[rule.units(*size) for size in request.images] for request in mix.requests]
    shares = (f"{seen / forecast:.1%}" for seen in (before, after))
    sizes = (f"{size / MIB:,.1f}" for size in (forecast, before, after))
    line = (row.name, " ".join("+".join(map(str, one)) for one in sent), *sizes, *shares)
    return Found(line, before <= after <= forecast)


def _count(plan: Plan) -> int:
    """Requests of the largest image that the gateway lets through, and one more than meets."""
    rule, limits, settings = plan.model.image_rule, plan.limits, plan.settings
    assert rule is not None
    tokens = rule.unit_tokens(limits.units_per_image) * limits.images_per_request
    meets = settings.max_prefill_token_num // tokens + 1
    return min(settings.max_batch_size, meets)


def _seen(plan: Plan, spec: TorchSpec, *cases: TorchCase) -> int:
    """The most that was live above the steady state in the last of the cases."""
    only = dataclasses.replace(spec, cases=cases)
    document = torch_report(run_torch(only, planned_scenario(plan)), {}, {})
    assert document["outcome"] == "served", document["death"]
    (card,) = beside(plan, document)
    (seen,) = (term.rehearsed for term in card.ledger if term.term == _CASE)
    assert seen is not None
    return seen
