"""What torch's allocator cannot give to a forward, in the PyTorch engine's account."""

from __future__ import annotations

import pytest

from turbofit import api
from turbofit.core.plan import Plan
from turbofit.memory.pytorch.weights import load_constants

SEGMENT = load_constants().segment


def _terms(plan: Plan) -> dict[str, int]:
    return {term.term: term.bytes for term in plan.gpus[0].ledger}


def test_a_prefill_has_no_room_in_the_graphs_pool() -> None:
    eager = api.plan("qwen2.5-7b", on="1xrtx3090", engine="pytorch", eager_mode=True)
    graphs = api.plan("qwen2.5-7b", on="1xrtx3090", engine="pytorch", eager_mode=False)
    assert "cuda_graphs" not in _terms(eager)
    assert _terms(graphs)["cuda_graphs"] >= SEGMENT
    assert _terms(graphs)["pool_warmup"] == _terms(eager)["pool_warmup"] >= SEGMENT
    assert graphs.kv.tokens < eager.kv.tokens


def test_the_smallest_worst_case_still_loses_a_segment() -> None:
    """Qwen2.5-7B's longest prompt: 116.8 MiB live on pretend GPUs, and a page in part."""
    plan = api.plan("qwen2.5-7b", on="1xrtx3090", engine="pytorch")
    assert _terms(plan)["text_prefill"] >= 116.8 * (1 << 20) + SEGMENT


def test_normed_queries_and_keys_are_counted() -> None:
    """Qwen3-VL-2B, chunks of 4096 and a long context: 378.4 MiB live on pretend GPUs."""
    plan = api.plan(
        "qwen3-vl-2b", on="1xrtx3060", engine="pytorch", image_size=(1344, 1568),
        max_prefill_token_num=4096, context=65_536,
    )  # fmt: skip
    assert _terms(plan)["text_prefill"] >= 378.4 * (1 << 20)


def test_what_a_tower_gives_the_first_layers_is_held() -> None:
    """Qwen3-VL-8B, 65,536 patches: 2,638.9 MiB live, 384 of them for three layers."""
    plan = api.plan("qwen3-vl-8b", on="1xrtx3090", engine="pytorch")
    seen, card = int(2638.9 * (1 << 20)), plan.gpus[0].total
    assert plan.limits.units_per_forward == 65536
    assert seen <= _terms(plan)["vision_forward"] <= seen + 0.02 * card


@pytest.mark.parametrize(
    ("rows", "seen"), [(8, 47.2), (32, 186.3), (50, 290.7), (64, 371.8), (128, 556.4)]
)
def test_so_many_rows_that_sample_are_never_under(rows: int, seen: float) -> None:
    """Qwen2.5-0.5B with top_k=0: live on pretend GPUs; torch sorts few rows with more."""
    plan = api.plan("qwen2.5-0.5b", on="1xrtx3060", engine="pytorch", max_batch_size=rows)
    assert _terms(plan)["sampling"] >= seen * (1 << 20)


def test_fewer_rows_than_the_batch_may_need_more() -> None:
    full, few = (
        api.plan("qwen2.5-0.5b", on="1xrtx3060", engine="pytorch", max_batch_size=rows)
        for rows in (128, 127)
    )
    assert _terms(full)["sampling"] == _terms(few)["sampling"]


@pytest.mark.parametrize(("rows", "idle"), [(8, 15.1), (50, 11.9), (64, 30.9), (160, 41.8)])
def test_what_the_warm_up_leaves_grows_with_the_batch(rows: int, idle: float) -> None:
    plan = api.plan("qwen2.5-0.5b", on="1xrtx3060", engine="pytorch", max_batch_size=rows)
    assert _terms(plan)["pool_warmup"] >= idle * (1 << 20)
