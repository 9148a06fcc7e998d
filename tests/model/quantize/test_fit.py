"""Which machine makes which model, and with how many samples."""

from __future__ import annotations

import re

import pytest

from tests.support.processes import REPO
from turbofit.core.errors import UsageError
from turbofit.core.units import GIB
from turbofit.machine.source import machine_from
from turbofit.model.presets import preset_model
from turbofit.model.quantize.fit import quantizing
from turbofit.model.quantize.program import Request


def made(name, spec, **request):
    return quantizing(preset_model(name), machine_from(spec), Request(name=name, **request))


def test_a_24_gb_card_makes_7b_and_host_memory_stops_72b() -> None:
    small = made("qwen2.5-vl-7b", "1xrtx3090,ram=64GiB")
    assert (small.fits, small.needs.samples, small.needs.tokens) == (True, 256, 2048)
    large = made("qwen2.5-vl-72b", "1xrtx3090,ram=64GiB")
    assert not large.fits
    assert "host memory lacks" in large.verdict
    assert "card lacks" not in large.verdict
    assert made("qwen2.5-vl-72b", "1xrtx3090,ram=192GiB").fits


def test_fewer_and_then_shorter_samples_are_taken_where_memory_is_short() -> None:
    few = made("llama-3.1-8b", "1xrtx3090,ram=20GiB")
    assert (few.needs.samples, few.needs.tokens) == (64, 2048)
    assert few.needs.host < 20 * GIB
    given = made("llama-3.1-8b", "1xrtx3090,ram=20GiB", samples=256, tokens=2048)
    assert (given.fits, given.needs.samples) == (False, 256)
    assert "with 256 samples of 2,048 tokens:" in given.verdict
    assert "not even" not in given.verdict
    assert (
        "not even with 64 samples of 512 tokens:" in made("llama-3.1-8b", "1xt4,ram=4GiB").verdict
    )


def test_published_weights_are_named() -> None:
    weights = "Qwen/Qwen2-VL-7B-Instruct-AWQ has 4-bit weights of this model"
    assert weights in made("qwen2-vl-7b", "1xrtx3090").warnings
    with pytest.raises(UsageError) as refused:
        made("internvl2-8b", "1xrtx3090")
    assert refused.value.hint.startswith("OpenGVLab/InternVL2-8B-AWQ has")


def test_the_program_runs_on_the_card_that_was_counted() -> None:
    """Without these variables it runs on the first card, whatever is free there."""
    several = made("llama-3.1-8b", "1xrtx3060+1xrtx3090,ram=64GiB")
    assert several.environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
    assert made("llama-3.1-8b", "1xrtx3090,ram=64GiB").environment == {}


def test_a_small_card_is_told_by_how_much_and_which_would_do() -> None:
    small = made("qwen2.5-vl-72b", "1xrtx3060,ram=192GiB")
    assert "card lacks" in small.verdict
    assert small.smallest_card is not None
    assert made("qwen2.5-vl-72b", f"1x{small.smallest_card},ram=192GiB").fits
    shared = made("qwen2.5-vl-72b", f"1x{small.smallest_card}:used=6GiB,ram=192GiB")
    assert not shared.fits


def test_a_host_that_is_not_known_is_said() -> None:
    unknown = made("llama-3.1-8b", "1xrtx3090")
    assert unknown.fits
    assert unknown.host_available == "NA"
    assert "if the host" in unknown.verdict


def test_samples_longer_than_the_model_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        made("llama-2-7b", "1xrtx3090", tokens=8192)
    assert "--calib-seqlen 4096" in caught.value.hint


def table_rows():
    """The rows of docs/quantize.md whose models are counted."""
    page = (REPO / "docs" / "quantize.md").read_text()
    pattern = r"^\| `([\w.-]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (.+?) \| (.+?) \|$"
    return re.findall(pattern, page, re.MULTILINE)


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row[0])
def test_the_table_of_the_page_is_what_the_command_says(row) -> None:
    name, *figures, does, awq = row
    spec = "1xrtx3090,ram=64GiB"
    full = made(name, spec, samples=256, tokens=2048)
    counted = (full.needs.card + full.context, full.needs.host, full.needs.disk)
    assert figures == [f"{size / GIB:.1f}" for size in counted]
    usual = made(name, spec)
    size = f"{usual.needs.samples} x {usual.needs.tokens:,}"
    assert does == (size if usual.fits else "no: host memory")
    assert ("host memory lacks" in usual.verdict) == (not usual.fits)
    own = usual.auto_awq
    assert awq == ("not taken" if own.why_not else f"{own.card / GIB:.1f}")


def test_the_page_has_ten_models() -> None:
    assert len(table_rows()) == 9  # and LLaVA, which is refused
