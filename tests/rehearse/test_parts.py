from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from tests.sweep import sweep
from turbofit.core.errors import UsageError
from turbofit.model.folder import FolderFiles
from turbofit.model.presets import known_presets, load_preset, preset_model
from turbofit.pretend.usage import Event
from turbofit.rehearse.checkpoint.kinds import kinds
from turbofit.rehearse.checkpoint.twin import main, tensors, twin_of, write_checkpoint
from turbofit.rehearse.turbomind.ledger import LOADER, STAGING, CallSites, Ledger
from turbofit.rehearse.turbomind.readings import card_terms, load_peak

pytestmark = pytest.mark.slow

#: Counted in `tests/model/test_parameters.py`; of each kind see `checkpoint/test_twin.py`.
COUNTED = (
    "internvl2-8b", "internvl2-26b", "internvl3.5-8b", "qwen2-vl-72b", "qwen2.5-vl-7b",
    "qwen3-vl-8b", "mixtral-8x7b", "qwen3-vl-30b-a3b", "qwen2.5-omni-7b", "qwen3-omni-30b-a3b",
)  # fmt: skip


#: Those of 200,000 tensors and more.
LARGEST = [name for name in known_presets() if name.startswith(("kimi-k2", "intern-s1-pro"))]
PRESETS = [
    *sweep(name for name in known_presets() if name not in LARGEST),
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LARGEST),
]


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_of_the_preset(name: str) -> None:
    preset = preset_model(name)
    assert sum(prod(shape) for _, _, shape in tensors(twin_of(preset))) == preset.parameters


def test_a_header_only_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint("Qwen2-VL-2B", tmp_path / "m")
    (path,) = folder.glob("*.safetensors")
    assert path.stat().st_blocks * 512 < 200_000
    header = FolderFiles(str(folder)).header(path.name)
    assert header["visual.patch_embed.proj.weight"].shape == (1280, 3, 2, 14, 14)
    total = sum(tensor.bytes for tensor in header.values())
    assert total == 2 * 2_208_985_600
    assert total < path.stat().st_size < total + 200_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert (folder / "preprocessor_config.json").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_twin_or_a_reason(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    whole = preset.vision is None or kinds().get(preset.architecture or "") is not None
    text = preset.text is not None and kinds().get(preset.text.architecture) is not None
    mla = preset.text is not None and preset.text.mla is not None
    packings = {"awq", "mxfp4", "compressed-tensors" if mla else "fp8"}
    other = preset.quantization is not None and preset.quantization.method not in packings
    if preset.unsupported or other or not whole or not text:
        with pytest.raises(UsageError):
            write_checkpoint(name, tmp_path)
        return
    assert any(write_checkpoint(name, tmp_path).glob("*.safetensors"))


def test_unknown_names_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["internvl2-9b", str(tmp_path)]) == 2
    assert "internvl2-8b" in capsys.readouterr().err


_NAMES = {
    1: "core::CudaMemPoolAllocator::allocate",
    2: "?",
    3: "LlamaLinear::Forward",
    4: "InternVit::Impl::Attn",
    5: "ModelExecutor::Impl::InternalThreadEntry",
    6: "TurboMind::Impl::CreateEngine",
}


@pytest.fixture
def sites() -> CallSites:
    return CallSites(_NAMES.__getitem__)


def test_sites(sites: CallSites) -> None:
    assert sites.site((1, 2, 3, 4, 5)) == "linear output in InternVit::Impl::Attn"
    assert sites.site((1, 4, 5)) == "InternVit::Impl::Attn"
    assert sites.site((1, 2)) == LOADER
    assert sites.site(()) == STAGING
    assert sites.owner((1, 5)) == "executor"
    assert sites.owner((1, 6)) == "rank context"


def _events(text: str) -> list[Event]:
    events = []
    for line in text.strip().splitlines():
        tag, *words = line.split()
        trace: tuple[int, ...] = ()
        if words and words[-1].startswith("@"):
            trace = tuple(int(c) for c in words.pop()[1:].split(",") if c)
        events.append(Event(tag, tuple(words), trace))
    return events


_RUN = """
P context
A 0 2 -1 18 18 v1 @6
P weights
A 0 1 0 100 118 a1 @1,2
P prepare
A 0 1 0 50 168 a2 @1,2
F a2 168
P engine
G 0 500 1000 @6
C 0 1 @6
A 0 1 1 400 568 b1 @1,6
R 0 0 100 518
A 0 1 1 20 538 b2 @1,6
C 0 2 @5
A 0 1 2 30 568 c1 @1,4,5
F c1 568
P ready
P case_x
A 0 1 2 70 608 c2 @1,4,5
O 0 1 2 999 392 929 @1,4,5
"""


def test_ledger_and_terms(sites: CallSites) -> None:
    events = _events(_RUN)
    ledger = Ledger(1, sites, pool_step=10).read(events)
    card = ledger.cards[0]
    assert card.free_at_cache == 500
    assert card.cache_region == 400
    assert card_terms(ledger, 0) == {
        "weights": 100, "load_temporaries": 50, "kv_cache": 400, "buffers": 20, "pool_warmup": 30,
    }  # fmt: skip
    assert load_peak(ledger, 0) == 168
    # Of what was not reached there are no terms.
    died = Ledger(1, sites, pool_step=10).read(_events("P context\nO 0 0 -1 5 1 5 @6"))
    assert card_terms(died, 0) == {}
    assert ledger.pools[2].live_peak["case_x"] == 70
    (death,) = ledger.deaths
    assert death["phase"] == "case_x"
    assert (death["asked"], death["left"], death["missing"]) == (999, 392, 537)
    assert death["where"] == "InternVit::Impl::Attn"
    # Read in parts it is the same.
    for cut in range(len(events)):
        parts = Ledger(1, sites, pool_step=10).read(events[:cut]).read(events[cut:])
        assert parts.cards == ledger.cards
        assert parts.pools == ledger.pools
        assert (parts.phases, parts.deaths) == (ledger.phases, ledger.deaths)
