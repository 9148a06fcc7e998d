from __future__ import annotations

from itertools import islice

from turbofit.load.driver import arrivals, drawn, replayed
from turbofit.load.spec import LoadSpec
from turbofit.load.trace import TracedRequest


def test_sizes_keep_to_their_spread_and_the_seed_decides() -> None:
    spec = LoadSpec.of(
        prompt_tokens=100, prompt_spread=0.5, output_tokens=10, image_size=((64, 64), (32, 32)),
        images=2,
    )  # fmt: skip
    found = list(islice(drawn(spec), 500))
    assert {one.output_tokens for one in found} == {10}
    prompts = [one.prompt_tokens for one in found]
    assert min(prompts) >= 50
    assert max(prompts) <= 150
    assert abs(sum(prompts) / 500 - 100) < 5
    assert {size for one in found for size in one.images} == {(64, 64), (32, 32)}
    assert found == list(islice(drawn(spec), 500))
    assert found != list(islice(drawn(spec.changed(seed=1)), 500))


def test_arrivals_of_an_open_loop() -> None:
    even = list(islice(arrivals(LoadSpec.of(rate=4.0, evenly=True), ()), 5))
    assert even == [0, 0.25, 0.5, 0.75, 1.0]
    times = list(islice(arrivals(LoadSpec.of(rate=4.0), ()), 4001))
    assert times == sorted(times)
    assert abs(times[-1] - 1000) < 60  # four standard deviations of 4,000 arrivals at 4/s


def test_a_trace_is_replayed_once_at_its_speed() -> None:
    trace = (
        TracedRequest(at=0.0, output_tokens=0, prompt_tokens=5),
        TracedRequest(at=4.0, output_tokens=2, images=((8, 8),)),
    )
    assert list(arrivals(LoadSpec.of(trace="t", trace_speed=2.0), trace)) == [0, 2]
    first, second = replayed(trace)
    assert (first.prompt_tokens, first.output_tokens) == (5, 1)
    assert (second.prompt_tokens, second.images) == (1, ((8, 8),))
