"""Names near a misspelt one, and what vLLM's options are called here."""

from __future__ import annotations

import pytest

from turbofit.core.errors import option_of
from turbofit.core.messages import guess, meant, near, neighbours, of_other_server, plain
from turbofit.planning.request import PlanRequest
from turbofit.serving.options import ServeOptions
from turbofit.serving.passthrough import engine_options


def test_every_option_that_the_table_names_is_one() -> None:
    known = {*PlanRequest.model_fields, *ServeOptions.model_fields}
    programs = neighbours()["programs"]
    for name, row in (it for rows in programs.values() for it in rows.items()):
        assert row.get("here", "tp") in known, name
        assert row.get("here") or row["say"], name
        assert f"--{name}" not in engine_options(), name
        assert sum(name in rows for rows in programs.values()) == 1, name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("--mem-fraction-static", "--budget, a share of each card, as 90%"),
        ("tensor_parallel_size", "--tp"),
        ("--chunked-prefill-size", "--max-prefill-token-num"),
        ("--max-running-requests", "--max-batch-size"),
        ("-np", "--concurrency"),
        ("-c", "--context"),
        ("--num-ctx", "--context"),
        ("-ngl", "all layers are on the GPUs"),
        ("--quantization", "leave it out: the checkpoint's config says"),
        ("--no-such-thing", ""),
    ],
)
def test_what_has_another_name_in_vllm(name: str, said: str) -> None:
    _, _, here = of_other_server(name, option_of).partition("; here: ")
    assert here.startswith(said) if said else here == ""


def test_what_is_unlike_is_no_misspelling() -> None:
    assert near("--imags", ["--images", "--json"]) == ["--images"]
    for wrong, right in (("--users", "--cluster"), ("--free", "--file"), ("--model", "--md")):
        assert near(wrong, [right]) == []
        assert guess(wrong, [right]) == ""
    assert meant("iamges", ["images", "on"]) == "did you mean images?"
    assert meant("zzz", ["images", "on"]) == "known: images, on"
    assert plain(" \u201c\uff12x3090\u201d ") == "2x3090"
