"""Names near a misspelt one, and what vLLM's options are called here."""

from __future__ import annotations

import pytest

from turbofit.core.errors import option_of
from turbofit.core.messages import guess, meant, near, neighbours, of_vllm, plain
from turbofit.planning.request import PlanRequest
from turbofit.serving.options import ServeOptions
from turbofit.serving.passthrough import engine_options


def test_every_option_that_the_table_names_is_one() -> None:
    known = {*PlanRequest.model_fields, *ServeOptions.model_fields}
    for name, row in neighbours()["vllm"].items():
        assert row.get("here", "tp") in known, name
        assert row.get("here") or row["say"], name
        assert f"--{name}" not in engine_options(), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("--gpu-memory-utilization", "--budget, a share of each card, as 90%"),
        ("tensor_parallel_size", "--tp"),
        ("--quantization", "leave it out: the checkpoint's config says"),
        ("--no-such-thing", ""),
    ],
)
def test_what_has_another_name_in_vllm(name: str, said: str) -> None:
    here = of_vllm(name, option_of).removeprefix("an option of vLLM; here: ")
    assert here.startswith(said) if said else here == ""


def test_what_is_unlike_is_no_misspelling() -> None:
    assert near("--imags", ["--images", "--json"]) == ["--images"]
    for wrong, right in (("--users", "--cluster"), ("--free", "--file"), ("--model", "--md")):
        assert near(wrong, [right]) == []
        assert guess(wrong, [right]) == ""
    assert meant("iamges", ["images", "on"]) == "did you mean images?"
    assert meant("zzz", ["images", "on"]) == "known: images, on"
    assert plain(" \u201c\uff12x3090\u201d ") == "2x3090"
