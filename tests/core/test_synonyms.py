"""Names of other programs, and what turbofit has for the same."""

from __future__ import annotations

import click
import pytest

from turbofit.cli.command_group import COMMANDS, TURBOFIT
from turbofit.cli.usage_errors import options_by_command
from turbofit.core.synonyms import _tables, command_synonym, near, synonym
from turbofit.launch.serve.passthrough import engine_options


def test_every_option_that_the_table_names_is_one() -> None:
    ctx = click.Context(TURBOFIT)
    ours = {name for _, it in options_by_command(ctx) for name in (*it.opts, *it.secondary_opts)}
    tables = _tables()
    for name, option in tables.options.items():
        known = {*ours, *engine_options(), "--MODEL"}
        assert not option.to or f"--{option.to}" in known, name
        assert option.to or option.say, name
        # Those have a table of their own, but for -tp of other programs.
        assert name == "tp" or f"--{name}" not in engine_options(), name
    assert not tables.commands.keys() & COMMANDS.keys()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("--gpu-memory-utilization", "0.9", "--budget 90%"),
        ("--gpu_memory_utilization", "x", "--budget 90%"),
        ("--mem-fraction-static", ".05", "--budget 05%"),
        ("num_ctx", "4096", "--context 4096"),
        ("-np", "4", "--concurrency 4"),
        ("--kv-cache-dtype", "fp8_e5m2", "--quant-policy fp8_e5m2"),
        ("--kv-cache-dtype", "auto", "--quant-policy 0"),
        ("--kv-cache-dtype", "nvfp4", "--quant-policy"),
        ("--cache-type-k", "q8_0", "--quant-policy 8"),
        ("--quantization", "awq_marlin", "leave it out: the checkpoint's config says"),
        ("--image", "4k", "--image-size 4k"),
        ("--limit-mm-per-prompt", "image=4,video=1", "--images 4"),
        ("--limit-mm-per-prompt", '{"image": 4}', "--images 4"),
        ("--mm-processor-kwargs", '{"max_pixels": 1003520}', "--max-pixels 1003520"),
        ("--mm-processor-kwargs", '{"max_dynamic_patch": 6}', "--max-pixels (InternVL's max_"),
        ("--mm-processor-kwargs", "{", "--max-pixels"),
        ("-ngl", "99", "leave it out"),
        ("--speculative-config", "{}", "it takes memory that no plan counts"),
        ("--num-gpus", "2", "--tp 2 (and a machine of so many cards is --on 2xrtx3090)"),
    ],
)
def test_the_value_is_translated(name: str, value: str, said: str) -> None:
    whose, _, here = synonym(name).here(value, "--{option} {value}").partition("; here: ")
    assert whose.startswith("an option of ")
    assert here.startswith(said)


def test_what_nobody_says_or_is_unlike_is_no_misspelling() -> None:
    assert synonym("--no-such-thing") is None
    assert command_synonym("qqqq") is None
    assert str(command_synonym("RUN")).startswith("turbofit serve MODEL")
    assert near("--imags", ["--images", "--json"]) == ["--images"]
    for wrong, right in (("--users", "--cluster"), ("--free", "--file"), ("--model", "--md")):
        assert near(wrong, [right]) == []
