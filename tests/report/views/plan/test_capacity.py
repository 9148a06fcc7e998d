from __future__ import annotations

from tests.report.documents import planned
from turbofit.report.views.plan.figures import capacity


def test_users_are_whole_blocks_of_the_cache() -> None:
    plan = planned("fits")
    found = capacity(plan)
    assert found.tokens == plan.kv.total_tokens
    assert found.images == plan.kv.tokens // (13 * 256)
    first = found.users[0]
    assert first.tokens == 13 * 256 + 512  # a multiple of 64 already
    assert first.held == plan.kv.tokens // first.tokens
    assert first.running == plan.settings.max_batch_size
    assert [one.held for one in found.users] == sorted((u.held for u in found.users), reverse=True)
    assert found.users[-1].tokens == plan.kv.longest_request_tokens


def test_a_request_never_lies_in_two_caches() -> None:
    plan = planned("mixed cards")
    first = capacity(plan).users[0]
    each = [plan.of_group(number).kv.tokens for number in range(2)]
    assert each[0] != each[1]
    assert first.held == sum(tokens // first.tokens for tokens in each)


def test_no_images_no_figure_for_them() -> None:
    found = capacity(planned("text only"))
    assert found.images is None
    assert found.users[0].what == "512 tokens of text"


def test_a_cache_that_holds_nothing() -> None:
    found = capacity(planned("does not fit"))
    assert (found.tokens, found.images, found.users) == (0, 0, ())


def test_transformers_answers_one_request_at_a_time() -> None:
    found = capacity(planned("fallback"))
    assert {(one.held, one.running) for one in found.users} == {(1, 1)}
    assert found.images == 1
