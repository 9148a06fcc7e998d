from __future__ import annotations

from tests.report.documents import planned
from turbofit.report.views.figures import images_held, users_of


def test_users_are_whole_blocks_of_the_cache() -> None:
    plan = planned("fits")
    assert images_held(plan) == plan.kv.tokens // (13 * 256)
    users = users_of(plan)
    first = users[0]
    assert first.tokens == 13 * 256 + 512  # a multiple of 64 already
    assert first.held == plan.kv.tokens // first.tokens
    assert first.running == plan.settings.max_batch_size
    assert [one.held for one in users] == sorted((one.held for one in users), reverse=True)
    assert users[-1].tokens == plan.kv.longest_request_tokens


def test_a_request_never_lies_in_two_caches() -> None:
    plan = planned("mixed cards")
    first = users_of(plan)[0]
    each = [plan.of_group(number).kv.tokens for number in range(2)]
    assert each[0] != each[1]
    assert first.held == sum(tokens // first.tokens for tokens in each)


def test_no_images_no_figure_for_them() -> None:
    plan = planned("text only")
    assert images_held(plan) is None
    assert users_of(plan)[0].what == "512 tokens of text"


def test_a_cache_that_holds_nothing() -> None:
    plan = planned("does not fit")
    assert (images_held(plan), users_of(plan)) == (0, [])


def test_transformers_answers_one_request_at_a_time() -> None:
    plan = planned("fallback")
    assert {(one.held, one.running) for one in users_of(plan)} == {(1, 1)}
    assert images_held(plan) == 1
