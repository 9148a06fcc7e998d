"""What ``--hf-overrides`` changes of the model that is planned, and what is refused."""

from __future__ import annotations

import json

import pytest

import turbofit
from turbofit.core.errors import UsageError
from turbofit.model.overrides import overridden
from turbofit.model.source import resolve_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_a_scaling_lengthens_the_context_and_says_what_turbomind_reads() -> None:
    text, words = overridden(resolve_model("qwen2.5-7b"), json.dumps({"rope_scaling": YARN}))
    assert text.text.max_position_embeddings == 131072
    assert json.loads(words) == {"rope_scaling": YARN, "max_position_embeddings": 131072}
    assert overridden(text, words) == (text, words)


@pytest.mark.parametrize(
    ("given", "longest", "told"),
    [
        ({"max_position_embeddings": 65536}, 65536, {}),
        ({"max_position_embeddings": 4096}, 4096, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, 32768, {}),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 32768, {}),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            65536,
            {
                "rope_scaling": {
                    "type": "yarn", "factor": 2, "original_max_position_embeddings": 32768
                },
                "max_position_embeddings": 65536,
            },
        ),
        ({"rope_scaling": YARN, "max_position_embeddings": 65536}, 65536, {}),
    ],
)  # fmt: skip
def test_contexts(given: dict[str, object], longest: int, told: dict[str, object]) -> None:
    model, words = overridden(resolve_model("qwen2.5-7b"), json.dumps(given))
    assert model.text.max_position_embeddings == longest
    assert json.loads(words) == given | told


@pytest.mark.parametrize(
    ("name", "path"),
    [("qwen2-vl-2b", ["text_config"]), ("internvl2-1b", ["llm_config"])],
)
def test_the_language_model_of_a_vision_model_has_a_section(name: str, path: list[str]) -> None:
    """At the top LMDeploy would take the keys, and read them nowhere (transformers 5.17)."""
    model, inner = resolve_model(name), {"max_position_embeddings": 65536}
    with pytest.raises(UsageError, match="changes max_position_embeddings") as caught:
        overridden(model, json.dumps(inner))
    assert f"inside {path[0]} have an account" in caught.value.hint
    changed, _ = overridden(model, json.dumps({path[0]: inner}))
    assert changed.text.max_position_embeddings == 65536


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{rope", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"vocab_size": 5}', "changes vocab_size, which no account covers"),
        ('{"fp32_lm_head": true}', "changes fp32_lm_head"),
        ('{"rope_theta": 1e6}', "changes rope_theta, which no account covers"),
        ('{"rope_scaling": {"rope_type": "longrope"}}', "'longrope', which has no account"),
        ('{"rope_scaling": {"rope_type": "yarn"}}', "factor is missing"),
        ('{"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}', "factor is 0.5"),
        ('{"rope_scaling": 4}', "is not an object"),
        (json.dumps({"rope_scaling": YARN, "rope_parameters": YARN}), "has both rope_scaling and"),
        ('{"max_position_embeddings": "128k"}', "is not an integer"),
    ],
)
def test_refusals_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        overridden(resolve_model("qwen2.5-7b"), text)
    assert message in caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("engine", ["turbomind", "pytorch"])
def test_a_plan_promises_the_context_and_tells_the_engine(engine: str) -> None:
    given = json.dumps({"rope_scaling": YARN})
    plan = turbofit.plan(
        "qwen2.5-0.5b", on="1xrtx3090", engine=engine, context="max", hf_overrides=given
    )
    assert plan.promise.context == 131072
    command = plan.engines[0].command
    assert command is not None
    argv = command.argv
    told = json.loads(argv[argv.index("--hf-overrides") + 1])
    assert told["max_position_embeddings"] == 131072
    assert plan.engines[0].lmdeploy_settings()["hf_overrides"] == told
