"""The account beside the real model code on pretend GPUs: never under, and not far over."""

from __future__ import annotations

import pytest

from tests.pretend.cuda_torch import CUDA_PATH, cuda_json
from turbofit.core.plan import Workload
from turbofit.machine.source import machine_from
from turbofit.memory.transformers.account import Transformers
from turbofit.model.presets import preset_model
from turbofit.tuner.fallback import make_fallback_plan
from turbofit.tuner.resolved_request import ResolvedRequest

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.slow,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]
MIB = 1 << 20
PROGRAM = """
import json, sys
from turbofit.core.plan import Plan
from turbofit.rehearse.planned import plan_document
print(json.dumps(plan_document(Plan.from_json(sys.stdin.read()))))
"""


# One card; two cards, whose cut the real hooks carry tensors across; layers in host memory.
@pytest.mark.parametrize(
    ("on", "more"),
    [
        ("1xrtx3090", {}),
        pytest.param("2xrtx3060", {"tp": 2}, marks=pytest.mark.exhaustive),
        pytest.param("1xrtx3060:used=8600MiB", {}, marks=pytest.mark.exhaustive),
    ],
)
def test_qwen2_vl_2b(on, more):
    request = ResolvedRequest(
        model=preset_model("qwen2-vl-2b"), machine=machine_from(f"{on},ram=64GiB"),
        workload=Workload(), max_pixels=1003520, **more,
    )  # fmt: skip
    plan = make_fallback_plan(request, Transformers(), "as asked")
    assert plan.fits
    assert ("cpu" in (plan.device_map or {}).values()) == ("used" in on)
    document = cuda_json("-c", PROGRAM, given=plan.to_json())
    assert document["outcome"] == "served"
    for phases, terms, gpu in zip(
        (gpu["phases"] for gpu in document["gpus"]), document["terms"], plan.gpus, strict=True
    ):
        outside = sum(t.bytes for t in gpu.ledger if t.phase in ("before", "context"))
        forecast = gpu.peak - outside
        held = max(phases[f"case {case['name']}"]["reserved_peak"] for case in document["cases"])
        assert held <= forecast, (gpu, document["cases"])
        assert forecast <= 1.15 * held
        weights = sum(t.bytes for t in gpu.ledger if t.phase == "weights")
        assert terms["weights"] <= phases["load"]["reserved"] <= weights
