"""What a draft takes on the first rank of the PyTorch engine, and which cards it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import UNSET

import turbofit
from bench.rehearsal.drafts import Algorithm, write_draft
from turbofit.core.errors import NoKernelError, UsageError
from turbofit.core.model import Draft, Model
from turbofit.core.plan import Plan, Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.activations import Activations, attention_parts
from turbofit.memory.pytorch.cache import draft_block
from turbofit.memory.pytorch.weights import draft_staged, draft_weights, load_constants
from turbofit.model.drafts import with_draft
from turbofit.model.source import resolve_model

LLAMA = resolve_model("llama-3.1-8b")
#: Llama-3.1-8B's layer by hand: queries and outputs, keys and values, gate, up and down, a norm.
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 4096


def drafted(folder: Path, algorithm: Algorithm, **options: bool) -> Model:
    return with_draft(LLAMA, algorithm, str(write_draft(LLAMA, folder, algorithm, **options)), 3)


def read(folder: Path, algorithm: Algorithm, **options: bool) -> Draft:
    draft = drafted(folder, algorithm, **options).draft
    assert draft is not UNSET
    return draft


def work(model: Model, processors: int = 108) -> Activations:
    made = Activations(model, Settings(), load_constants())
    made.processors = processors
    return made


def test_weights_by_hand(tmp_path: Path) -> None:
    """As torch counted them on pretend GPUs: 1,482 and 858 MiB."""
    eagle, third = read(tmp_path / "1", "eagle"), read(tmp_path / "3", "eagle3")
    embeddings = 128256 * 4096
    assert draft_weights(eagle) == 2 * (embeddings + 2 * 4096 * 4096 + LAYER)
    assert draft_staged(eagle) == 0
    # attention reads twice as many channels, and the class makes a plain one first
    joined, plain = (4096 + 2 * 1024) * 4096, (4096 + 2 * 1024) * 4096
    head, states = 32000 * 4096, 3 * 4096 * 4096
    weights = LAYER + joined + plain + head + states + 3 * 4096
    assert draft_weights(third) == 2 * weights + 3 * 8 * 32000
    assert draft_staged(third) == 2 * embeddings
    own = read(tmp_path / "own", "eagle3", embeds=True)
    assert draft_weights(own) - draft_weights(third) == draft_staged(third)
    assert draft_staged(own) == 0


def test_blocks_are_whole_on_their_rank(tmp_path: Path) -> None:
    model = drafted(tmp_path / "draft", "eagle3")
    assert draft_block(model, Settings(tp=4)) == 2 * 64 * 8 * 128 * 2
    assert draft_block(LLAMA, Settings()) == 0


def test_states_in_cuda_graphs(tmp_path: Path) -> None:
    """Seen on pretend GPUs: 401.3 MiB for 328 sequences, 14,002 blocks and 3 tokens."""
    model = drafted(tmp_path / "draft", "eagle3")
    captured, made = [1, 2, 4, 8, 16, 32, 64, 128, 256, 328], work(model)
    tables = sum(captured) * 14002 * 4
    assert model.draft
    step = made.draft_graphs(model.draft, [328], 0) - made.draft_graphs(model.draft, [0, 328], 0)
    assert step == 0
    given = made.graph_buffers(captured) + made.draft_graphs(model.draft, captured, 14002)
    alone = made.draft_graphs(model.draft, [328], 0)
    each = 4 * (3 + 2) * 4096 + 3 * 4096
    size = given + tables - (alone - 328 * each * 2)
    assert size / MIB == pytest.approx(401, abs=12)


@pytest.mark.parametrize(
    ("heads", "processors", "parts"),
    # by hand, of hopper/heuristics.h: 8 * 12 of 108 are 0.89 of a card, 8 * 27 of 216 all of it
    [(8, 108, 12), (4, 108, 23), (8, 132, 15), (1, 108, 92), (32, 40, 1), (32, 108, 3)],
)
def test_parts_of_flash_attention(heads: int, processors: int, parts: int) -> None:
    assert attention_parts(heads, processors) == parts


@pytest.mark.parametrize(("tokens", "rows", "seen"), [(1, 256, 36.0), (3, 64, 50.4), (5, 48, 64.0)])
def test_sampling_of_all_tokens(tokens: int, rows: int, seen: float, tmp_path: Path) -> None:
    """Bytes of a logit, as torch counted them on pretend GPUs."""
    folder = write_draft(LLAMA, tmp_path / "draft", "eagle")
    model = with_draft(LLAMA, "eagle", str(folder), tokens)
    size = work(model).sampling(rows) - load_constants().sampling_base
    assert 0 <= size / (rows * 128256) - seen <= 2


def planned(folder: Path, on: str, **options: object) -> Plan:
    if not folder.exists():
        write_draft(LLAMA, folder, "eagle3")
    given = {"speculative_algorithm": "eagle3", "speculative_draft_model": str(folder), **options}
    return turbofit.plan("llama-3.1-8b", on=on, **given)  # type: ignore[arg-type]


def test_a_plan_has_terms_and_words_of_it_and_no_speed(tmp_path: Path) -> None:
    plan = planned(tmp_path / "draft", "1xa100-40g", speculative_num_draft_tokens=3)
    engine, draft = plan.engines[0], plan.model.draft
    assert draft is not UNSET
    ledger = engine.ledgers[0]
    assert ledger.bytes_of("weights.draft") == draft_weights(draft)
    shares = ledger.bytes_of("kv_cache.draft") * 32, ledger.bytes_of("kv_cache")
    assert shares[0] == pytest.approx(shares[1], abs=64 * MIB)  # whole pages
    assert ledger.bytes_of("draft_graphs")
    assert engine.command is not None
    argv = engine.command.argv
    for option, value in {
        "algorithm": "eagle3",
        "draft-model": draft.path,
        "num-draft-tokens": "3",
    }.items():
        assert argv[argv.index(f"--speculative-{option}") + 1] == value
    assert engine.speculative_config() == {
        "method": "eagle3", "model": draft.path, "num_speculative_tokens": 3,
    }  # fmt: skip
    assert not {name for name in engine.lmdeploy_settings() if "speculative" in name}
    assert plan.throughput is not None
    assert plan.throughput.output_tokens_per_second is None
    assert plan.backend.name == "pytorch"
    assert "engine pytorch: it alone takes --speculative-algorithm" in plan.reasons
    assert Plan.from_json(plan.to_json()) == plan


def test_only_the_first_rank_has_it(tmp_path: Path) -> None:
    plan = planned(tmp_path / "draft", "2xa100-40g", tp=2)
    first, second = plan.engines[0].ledgers
    assert first.bytes_of("kv_cache") == second.bytes_of("kv_cache")
    assert first.bytes_of("weights.draft") > 0 == second.bytes_of("weights.draft")
    assert not {"kv_cache.draft", "draft_graphs"} & {term.term for term in second.terms}
    # the blocks are those that the fuller rank has room for
    full = planned(tmp_path / "draft", "a100-40g+a100-40g:free=12GiB", tp=2)
    assert full.engines[0].kv.tokens < plan.engines[0].kv.tokens


def test_what_it_needs(tmp_path: Path) -> None:
    for card in ("t4", "b200"):
        with pytest.raises(NoKernelError, match="compute capability 8 and 9, and none for"):
            planned(tmp_path / "draft", f"1x{card}")
    with pytest.raises(UsageError, match="FlashAttention-3 reads the caches of draft"):
        planned(tmp_path / "draft", "1xa100-40g", quant_policy=8)
    with pytest.raises(UsageError, match="no option of the turbomind") as caught:
        planned(tmp_path / "draft", "1xa100-40g", engine="turbomind")
    assert "ignores drafts" in caught.value.hint
