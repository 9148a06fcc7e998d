"""Parsers of LMDeploy's server by a model's family."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from turbofit.core.presets import load_yaml, preset_path
from turbofit.model.source import resolve_model
from turbofit.serving.engine.parsers import parser_of, parser_options


@pytest.mark.parametrize(
    ("model", "tool", "reasoning"),
    [
        ("qwen3-8b", "qwen3", "default"),
        ("qwen3-vl-8b", "qwen3", None),
        ("qwen2.5-7b", "qwen2d5", None),
        ("qwen2.5-vl-7b", None, None),
        ("qwen3.5-35b-a3b", "qwen3coder", "default"),
        ("qwen3.5-0.8b", "qwen3coder", None),  # it does not think unless it is asked to
        ("intern-s1", "intern-s1", "default"),
        ("llama-3.1-8b", "llama3", None),
        ("llama-2-7b", None, None),
        ("deepseek-r1", None, "default"),
        ("internvl2-8b", None, None),
    ],
)
def test_the_parsers_of_a_family(model, tool, reasoning):
    model = resolve_model(model)
    assert (parser_of("tool", model), parser_of("reasoning", model)) == (tool, reasoning)


def test_what_the_user_gives_is_kept_and_a_tokenizer_without_the_tag_gets_no_parser(tmp_path):
    model = resolve_model("qwen3-8b")
    assert list(parser_options(model, tmp_path, ())) == ["--tool-call-parser", "qwen3"]
    (tmp_path / "tokenizer_config.json").write_text('{"added": "<think>"}')
    thinks = ["--reasoning-parser", "default"]
    assert list(parser_options(model, tmp_path, ()))[2:] == thinks
    assert list(parser_options(model, tmp_path, ["--tool-call-parser=llama3"])) == thinks
    assert not list(parser_options(resolve_model("internvl2-8b"), tmp_path, ()))


def test_every_name_is_a_parser_of_lmdeploy() -> None:
    spec = importlib.util.find_spec("lmdeploy")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("no lmdeploy")
    folder = Path(spec.submodule_search_locations[0]) / "serve" / "parsers"
    rows = load_yaml(preset_path("engines", "parsers"))
    for kind in ("tool", "reasoning"):
        texts = [path.read_text(encoding="utf-8") for path in folder.glob(f"{kind}_parser/*.py")]
        calls = re.findall(r"ParserManager.register_module\((.*)\)", "\n".join(texts))
        known = set(re.findall(r"'([^']+)'", " ".join(calls)))
        assert {row["parser"] for row in rows[kind]} <= known
