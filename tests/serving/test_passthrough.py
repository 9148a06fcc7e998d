"""What clients may ask of LMDeploy through turbofit: names of a model, and its own options."""

from __future__ import annotations

import contextlib
import dataclasses

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.new_lmdeploy import ParserOption, parser_options, with_options
from turbofit.cli.main import TURBOFIT
from turbofit.core.errors import UsageError
from turbofit.core.plan import config_names
from turbofit.core.presets import preset_path
from turbofit.serving.passthrough import (
    engine_options,
    option_table,
    sort_options,
    uncounted_fields,
)


def test_what_passes() -> None:
    passed = sort_options(["--api-keys", "a", "b", "--max-log-len=5", "--chat-t", "y"])
    # Abbreviations mean what LMDeploy makes of them.
    assert passed.argv == ["--api-keys", "a", "b", "--max-log-len", "5", "--chat-template", "y"]
    assert passed.api_keys == ["a", "b"]
    assert not passed.unplanned


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--session-len", "4096"], "set by turbofit", "before --"),
        (["--quant-policy=8"], "set by turbofit", "give --quant-policy before --"),
        (["--server-name", "0.0.0.0"], "set by turbofit", "before --"),
        (["--adapters", "a=b"], "set by turbofit", "give --adapters before --"),
        (["--rope-scaling-factor", "2"], "reads it nowhere", "--hf-overrides"),
        (["--no-such-option"], "no option of LMDeploy", "--unplanned"),
        (["model"], "not an option", "before --"),
        (["--chat-template"], "needs a value", "VALUE"),
        (["--allow-origins", "--ssl"], "needs a value", "VALUE"),
        (["--cache-max", "0.5"], "set by turbofit", "before --"),
        (["--allow", "x"], "is no option of LMDeploy", "--unplanned"),
    ],
)
def test_refusals(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        sort_options(words)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_what_passes_unplanned_is_said() -> None:
    words = ["--speculative-dflash-block-size", "8"]
    words += ["--num-tokens-per-iter", "8"]
    with pytest.raises(UsageError, match="drafts that propose a block at once"):
        sort_options(words)
    words += ["--new", "1"]
    passed = sort_options(words, unplanned=True)
    assert passed.argv == words
    assert passed.unplanned == ["--speculative-dflash-block-size", "--num-tokens-per-iter", "--new"]
    with pytest.raises(UsageError, match="set by turbofit"):  # which nothing contradicts
        sort_options(["--cache-max-entry-count", "0.9"], unplanned=True)


@given(st.lists(st.text(alphabet="-abcdept=0 ", max_size=8), max_size=5))
def test_words_of_any_kind(words: list[str]) -> None:
    with contextlib.suppress(UsageError):
        sort_options(words)


def test_every_row_says_what_its_meaning_needs() -> None:
    serve = TURBOFIT.get_command(click.Context(TURBOFIT), "serve")
    ours = {name for param in serve.params for name in param.opts}
    for name, option in engine_options().items():
        assert option.is_ != "undecided", f"{name}: say what it means to turbofit"
        assert {word.partition("=")[0] for word in option.as_} <= ours, name
        assert option.is_ != "planned" or name in ours, name
        assert option.is_ != "taken" or option.as_ or option.variables or option.say, name


@pytest.mark.lmdeploy
def test_the_table_has_every_option_of_the_installed_lmdeploy() -> None:
    """Those of 0.16 and 0.17 were read off their wheels; what is new is `undecided`."""
    lmdeploy = pytest.importorskip("lmdeploy")
    found = parser_options()
    table, version = option_table(), ".".join(lmdeploy.__version__.split(".")[:2])
    here = {
        name: option
        for name, option in table.options.items()
        if option.until is None and name not in table.lacks[version]
    }
    theirs = {name: one.values for name, one in found.items()}
    assert {name: option.values for name, option in here.items()} == theirs
    for name, option in here.items():
        default = found[name].default
        told = option.is_ == "refused" and default not in ("None", "False", "[]")
        assert not told or option.default == default, name


def test_what_a_newer_parser_has_is_added_and_must_be_decided() -> None:
    text = preset_path("engines", "lmdeploy-options").read_text()
    found = {name: ParserOption(1, "None", None) for name in [*engine_options(), "--new"]}
    written = with_options(text, "0.19", found)
    assert written.endswith("  --new: {is: undecided, values: 1}\n")
    assert '\n  "0.19": []\noptions:\n' in written
    assert with_options(written, "0.19", found).count('"0.19"') == 1


#: Fields that say how the engine runs, and not how much memory it takes.
FREE_FIELDS = {
    "devices", "async_", "cache_checkpoint_interval", "cache_prompt", "cache_prompt_boundary_skip",
    "cache_generation", "prefill_interval", "thread_safe", "enable_mp_engine", "mp_engine_backend",
    "enable_transfer_obj_ref",
}  # fmt: skip


@pytest.mark.lmdeploy
@pytest.mark.parametrize("engine", ["turbomind", "pytorch"])
def test_every_field_of_an_engine_config_has_a_meaning(engine: str) -> None:
    """`turbofit.pipeline` plans with it, warns of it, or hands it on."""
    lmdeploy = pytest.importorskip("lmdeploy")
    config = {"turbomind": "TurbomindEngineConfig", "pytorch": "PytorchEngineConfig"}[engine]
    fields = {field.name for field in dataclasses.fields(getattr(lmdeploy, config))}
    planned = {name for _, name in config_names(engine)}
    handed_on = {name.lstrip("-").replace("-", "_") for name in engine_options()}
    assert fields - planned - uncounted_fields() - handed_on <= FREE_FIELDS
    assert not planned & uncounted_fields()


def test_the_lists_of_older_versions_are_kept() -> None:
    table = option_table()
    assert list(table.lacks) == ["0.16", "0.17", "0.18"]
    assert all(set(names) <= set(table.options) for names in table.lacks.values())
    sizes = [len(table.options) - len(names) for names in table.lacks.values()]
    assert sizes == sorted(sizes)
