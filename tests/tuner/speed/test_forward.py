"""One forward: what hides behind what, and what does not."""

from __future__ import annotations

import pytest

from turbofit.core.plan import Settings
from turbofit.machine.spec import parse_spec
from turbofit.memory.engines import engine_named
from turbofit.model.source import resolve_model
from turbofit.tuner.speed.all_reduce import all_reduce_of
from turbofit.tuner.speed.forward import ForwardPass, forward_pass_of
from turbofit.tuner.speed.rates import card_of, rates
from turbofit.tuner.speed.work import work_of


def forward(model: str = "llama-3.1-8b", on: str = "1xa100-80g", **settings: int) -> ForwardPass:
    machine, figures = parse_spec(on), rates()
    work = work_of(
        resolve_model(model), Settings(tp=len(machine.gpus), **settings), engine_named("turbomind")
    )
    reduce = all_reduce_of(machine, machine.gpus, figures)
    return forward_pass_of(work, card_of(machine.gpus, figures), reduce, figures)


def test_few_tokens_are_bound_by_memory_and_many_by_products() -> None:
    one = forward()
    launches = one.launches
    assert one.seconds(1) == one.seconds(64)
    read = one.work.weights / one.card.bandwidth
    assert one.seconds(1) == pytest.approx(read + launches)
    assert one.seconds(4096) - launches == pytest.approx(2 * (one.seconds(2048) - launches))


def test_attention_hides_behind_no_product() -> None:
    one = forward()
    for tokens in (1, 4096):
        cached = one.seconds(tokens, cached=10**5) - one.seconds(tokens)
        assert cached == pytest.approx(10**5 * one.work.kv_bytes / one.card.bandwidth)
        pairs = one.seconds(tokens, pairs=10**7) - one.seconds(tokens)
        assert pairs == pytest.approx(10**7 * one.work.pair_flops / one.card.flops)


def test_quantised_weights_and_keys_are_read_faster() -> None:
    plain, packed = forward("qwen2.5-14b"), forward("qwen2.5-14b-awq")
    assert packed.seconds(1) < 0.5 * plain.seconds(1)
    steps = [forward(quant_policy=q).seconds(64, cached=10**6) for q in (0, 8, 4)]
    assert steps == sorted(steps, reverse=True)


def test_links_are_paid_for_by_tokens() -> None:
    alone, two = forward(), forward(on="2xa100-80g")
    assert alone.reduces(100) == 0 < two.reduces(1) < two.reduces(4096)
    assert two.seconds(1) < alone.seconds(1)
