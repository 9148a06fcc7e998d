from __future__ import annotations

import asyncio
import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.gateway.limits.parameters import GENERATION
from turbofit.gateway.limits.rules import Scope
from turbofit.launch.pipeline.held import hold_config, hold_engine

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SCOPE = Scope(engines=("turbomind",), vocabulary=512, session=4096)


@pytest.fixture(scope="module")
def config() -> Any:
    from lmdeploy import GenerationConfig

    return GenerationConfig


class Engine:
    """The one method of LMDeploy's engine that is wrapped, and its signature."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    async def preprocess(
        self, messages: Any, session_id: Any, gen_config: Any = None, input_ids: Any = None
    ) -> Any:
        self.given.append((messages, gen_config, input_ids))


def test_every_field_of_the_installed_config_is_known(config) -> None:
    assert {field.name for field in dataclasses.fields(config)} == set(GENERATION)


def test_what_the_engine_does_not_survive_is_lowered_and_said(config) -> None:
    asked = config(top_k=5000, max_new_tokens=10**6, random_seed=-1)
    with pytest.warns(UserWarning, match="top_k=5000->1024"):
        held = hold_config(asked, SCOPE)
    assert (held.top_k, held.max_new_tokens, held.random_seed) == (1024, 4096, 2**64 - 1)
    assert asked.top_k == 5000


def test_an_ordinary_config_stays(config) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hold_config(config(), SCOPE) == config()


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"gen_config": {"stop_token_ids": [512]}}, "ids are between 0 and 511"),
        ({"gen_config": {"repetition_penalty": 0.0}}, "above 0"),
        ({"input_ids": [-1]}, "ids are between 0 and 511"),
    ],
)
def test_what_cannot_be_lowered_is_the_requests_own_error(config, keywords, word) -> None:
    from lmdeploy.serve.core.exceptions import RequestError

    engine = Engine()
    hold_engine(engine, SCOPE)
    if "gen_config" in keywords:
        keywords = {"gen_config": config(**keywords["gen_config"])}
    with pytest.raises(RequestError, match=word):
        asyncio.run(engine.preprocess("x", 1, **keywords))
    assert engine.given == []


def test_the_engine_is_given_the_held_config_by_position_too(config) -> None:
    engine = Engine()
    hold_engine(engine, SCOPE)
    with pytest.warns(UserWarning, match="top_k"):
        asyncio.run(engine.preprocess("x", 1, config(top_k=2000)))
    assert engine.given[0][1].top_k == 1024


def test_an_engine_without_that_method_is_said_to_be_unheld() -> None:
    with pytest.warns(UserWarning, match="not held"):
        hold_engine(SimpleNamespace(), SCOPE)
