"""Where the hub's cache is, beside huggingface_hub's own answer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from turbofit.model.caches import hub_cache

NAMES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "given",
    [
        {}, {"XDG_CACHE_HOME": "/x"}, {"XDG_CACHE_HOME": "x"}, {"HF_HOME": "~/hf"},
        {"HF_HOME": "$HOME/hf", "XDG_CACHE_HOME": "/x"}, {"HUGGINGFACE_HUB_CACHE": "/old"},
        {"HF_HUB_CACHE": "~/new", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"},
    ],
)  # fmt: skip
def test_it_is_where_the_hub_downloads_to(given: dict[str, str]) -> None:
    pytest.importorskip("huggingface_hub")
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    environ = {k: v for k, v in os.environ.items() if k not in NAMES} | given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    assert hub_cache(given) == done.stdout.rstrip("\n")
