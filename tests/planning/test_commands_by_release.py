"""A command for an older LMDeploy has only options that it has."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.plan import Plan, Settings
from turbofit.memory.versions import parse
from turbofit.planning.commands import _releases, came_later, commands, grouped

#: Every option that a command of ours can have, with values that nothing is without.
ALL = Settings(
    communicator="cuda-ipc",
    enable_prefix_caching=True,
    model_format="awq",
    language_model_only=True,
    num_gpu_blocks=100,
    eager_mode=True,
    cudagraph_capture_batch_sizes=(1, 2),
    distributed_executor_backend="mp",
)


def predicted(version: str, engine: str = "turbomind", **options: object) -> Plan:
    return turbofit.predict(
        "internvl2-8b", on="2xa100-80g", lmdeploy=version, engine=engine, tp=2, **options
    )


def options_of(plan: Plan) -> set[str]:
    return {word for word in plan.commands[0].argv if word.startswith("--")}


@pytest.mark.parametrize("engine", ["turbomind", "pytorch"])
def test_every_option_of_a_command_has_the_release_that_brought_it(engine):
    plan = turbofit.predict("internvl2-8b", on="2xa100-80g", engine=engine, tp=2)
    model = replace(plan.model, revision="abc", hub_id="a/b")
    for source in (None, "/models/a"):
        with_all = replace(
            plan,
            settings=ALL,
            model=replace(model, source=replace(model.source, checkpoint=source)),
        )
        assert options_of(replace(plan, commands=commands(with_all))) <= set(_releases().options)
    assert {value.split()[0] for value in _releases().values} <= set(_releases().options)
    # None is newer than the parser that the list was read from.
    assert all((0, 0, 14) <= parse(one) <= (0, 18, 0) for one in _releases().options.values())


@pytest.mark.parametrize(
    ("option", "last_without", "first_with"),
    [
        ("--communicator", "0.7.1", "0.7.2"),
        ("--async", "0.11.1", "0.12.0"),
        ("--dtype", "0.6.0", "0.6.1"),
        ("--max-prefill-token-num", "0.5.3", "0.6.0"),
        ("--cache-block-seq-len", "0.2.6", "0.3.0"),
        ("--trust-remote-code", "0.12.3", "0.13.0"),
    ],
)
def test_an_option_stands_in_commands_from_its_release_on(option, last_without, first_with):
    model = "llama-2-7b" if option == "--cache-block-seq-len" else "internvl2-8b"

    def made(version):
        return turbofit.predict(model, on="1xa100-80g", lmdeploy=version, engine="turbomind")

    assert option not in options_of(made(last_without))
    assert option in options_of(made(first_with))
    # A usual value needs no word: the release does so without the option.
    assert not [text for text in made(last_without).warnings if option in text]


def test_what_a_release_cannot_be_told_is_said_first_with_the_release_that_can():
    made = predicted("0.5.3", max_prefill_token_num=4096, dtype="float16", async_=0)
    said = made.warnings[0]
    assert "api_server of LMDeploy 0.5.3 has no" in said
    assert "--max-prefill-token-num 4096 (from 0.6.0 on)" in said
    assert "--dtype float16 (from 0.6.1 on)" in said
    assert "--async 0 (from 0.12.0 on)" in said
    assert not {"--max-prefill-token-num", "--dtype", "--async"} & options_of(made)
    assert made.settings.max_prefill_token_num == 4096  # what is predicted stays what was asked


def test_a_value_can_be_newer_than_its_option():
    assert came_later(("--communicator", "cuda-ipc"), "0.9.2") == "0.10.0"
    assert came_later(("--communicator", "native"), "0.9.2") is None
    made = predicted("0.9.2", communicator="cuda-ipc")
    assert "--communicator" not in options_of(made)
    assert "no --communicator cuda-ipc (from 0.10.0 on)" in made.warnings[0]


def test_words_of_a_command_are_grouped_by_option():
    words = ("lmdeploy", "serve", "--tp", "2", "--eager-mode", "--sizes", "1", "2")
    assert list(grouped(words)) == [
        ("lmdeploy",), ("serve",), ("--tp", "2"), ("--eager-mode",), ("--sizes", "1", "2"),
    ]  # fmt: skip
    assert list(grouped(())) == []
