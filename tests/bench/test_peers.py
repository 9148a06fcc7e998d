"""`bench/peers`: vLLM's log read to a fate, and its requests; vLLM itself is not needed."""

from __future__ import annotations

import json

import pytest

from turbofit.core.units import MIB
from turbofit.model.presets import find_preset, preset_model


def fate(log: str) -> tuple[str, str]:
    from bench.peers import vllm_peer

    return vllm_peer._fate(log, vllm_peer._SAID.findall(log))


def test_an_end_is_survived_only_where_the_child_said_so():
    assert fate("PEERS ready 20.1\nPEERS case one image\nPEERS survived\n") == ("survived", "")


def test_a_start_that_vllm_refuses_for_memory_is_refused():
    log = "ValueError: To serve at least one request, 1.75 GiB KV cache is needed\n"
    assert fate(log)[0] == "refused"


def test_out_of_memory_after_the_start_is_a_death_of_its_case():
    log = (
        "PEERS ready 20.1\nPEERS case 16 images queued\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB\n"
    )
    died, of = fate(log)
    assert died == "died"
    assert of.startswith("case 16 images queued: CUDA out of memory")


@pytest.mark.parametrize("ready", ["", "PEERS ready 20.1\nPEERS case one image\n"])
@pytest.mark.parametrize("said", ["", "AssertionError: tokens that no kernel wrote\n"])
def test_what_kernels_that_computed_nothing_do_is_no_fate(ready, said):
    assert fate(ready + said)[0] == "stalled"


def test_a_shorter_context_and_what_was_turned_away_are_told():
    from bench.peers import vllm_peer

    log = "PEERS session 4096\nPEERS away one image: too long\nPEERS survived\n"
    note = vllm_peer._note(vllm_peer._SAID.findall(log))
    assert note == "turned away: one image: too long, session of 4096"


def test_every_pair_has_a_stand_in_and_the_worst_picture(tmp_path):
    from bench.peers.grid import VLLM_PAIRS
    from bench.peers.vllm_cases import cases_of
    from bench.peers.vllm_peer import stand_in

    for name in dict.fromkeys(pair.model for pair in VLLM_PAIRS):
        pair = next(pair for pair in VLLM_PAIRS if pair.model == name)
        model, folder = stand_in(pair, tmp_path)
        assert json.loads((folder / "config.json").read_text())
        rule = model.image_rule
        if rule is not None:
            one = next(case for case in cases_of(model) if case["name"] == "one image")
            assert rule.units(*one["size"]) == rule.worst_units(), name


def test_two_queued_pictures_and_their_text_have_room_in_the_context():
    from bench.peers.vllm_cases import cases_of

    preset = find_preset("qwen2-vl-7b")
    assert preset is not None
    model = preset_model(preset)
    queued = next(case for case in cases_of(model) if case["count"] > 1 and "size" in case)
    assert model.image_rule is not None
    tokens = model.image_rule.tokens(*queued["size"])
    assert 2 * (tokens + 258) <= model.text.max_position_embeddings


def test_a_broken_off_run_goes_on_from_its_log(tmp_path):
    from bench.peers.row import Row, RowLog, kept

    log = tmp_path / "vllm.jsonl"
    row = Row("m 1xl4", "turbofit's plan", "", 1, "survived", "", 0, None, None)
    assert RowLog(log).row(row.pair, row.who, lambda: row) == row
    assert kept(log) == {("m 1xl4", "turbofit's plan"): row}
    assert RowLog(log).row(row.pair, row.who, pytest.fail) == row
    assert kept(tmp_path / "none") == {}


def test_what_is_set_by_hand_is_no_peer_of_the_bar():
    from bench.peers import vllm_run
    from bench.peers.row import Row

    def row(who: str, tokens: int, fate: str = "survived") -> Row:
        return Row("m 1xl4", who, "", tokens, fate, "", 0, None, None)

    rows = [row("turbofit's plan", 100), row("vLLM, enforce_eager", 90), row("vLLM by hand", 110)]
    text = vllm_run.report(rows, "")
    bar, hand = text.split("## vLLM set by hand")
    assert "Bar met on 1 of 1" in bar
    assert "110" not in bar
    assert "| vLLM by hand | 110 | -9.1% | **no** |" in hand
    assert "**more tokens**" in hand


def test_a_pair_of_which_vllm_told_nothing_is_not_judged():
    from bench.peers import vllm_run
    from bench.peers.row import Row

    ours = Row("m 1xl4", "turbofit's plan", "", 100, "survived", "", 0, None, None)
    stalled = ours._replace(who="vLLM's defaults", tokens=None, fate="stalled")
    assert vllm_run.against([ours, stalled]) == []
    assert vllm_run.against([ours, stalled._replace(fate="died")]) != []


@pytest.mark.parametrize(
    "pair",
    [
        "llama-2-7b 1xrtx4060ti-16g",
        "llama-2-7b 1xrtx4070tisuper",
        "llama-2-7b 1xrtx4080",
        "llama-2-7b 1xrtx4080super",
        "internvl2-8b 1xrtx3090",
        "qwen2-vl-7b 1xa100-40g",
        "qwen3-8b 1xl4",
        "internvl3-2b 1xrtx3080-12g",
    ],
)
def test_a_plan_that_leaves_what_a_peer_leaves_holds_as_many_tokens(pair: str) -> None:
    import turbofit
    from bench.peers.every import at_its_room, of_peer
    from bench.peers.grid import PLAN, SETTINGS, Pair

    one = Pair(*pair.split())
    plan = turbofit.plan(one.model, on=one.on, tp=1, replicas=1, goal="context")
    peers = [setting.changed or {} for setting in SETTINGS if setting.name != PLAN]
    for peer in (of_peer(one, changed, plan) for changed in peers):
        # A peer that leaves less than nothing dies by the account, but for what that is over.
        if peer.gpus[0].headroom > -8 * MIB:
            assert at_its_room(one, peer) >= peer.kv.tokens


def test_a_plan_that_queues_images_is_sent_what_its_gateway_lets_through() -> None:
    import turbofit
    from bench.peers.workload import requests_of

    plan = turbofit.plan("internvl2-2b", on="1xl4:free=19GiB", engine="turbomind", goal="context")
    units = {}
    for gateway in (False, True):
        cases = {case["name"]: case for case in requests_of(plan, gateway=gateway)}
        queued = cases["images that meet"]["requests"]
        units[gateway] = sum(each for one in queued for each in one["units"])
    assert units[True] <= plan.limits.units_per_forward < units[False]


def test_cards_that_differ_in_their_context_are_rehearsed_apart() -> None:
    import turbofit
    from bench.peers.every import alike

    cards = ("rtx4070tisuper", "rtx4080")
    first, second = (turbofit.predict("llama-2-7b", on=f"1x{card}", tp=1) for card in cards)
    assert first.machine.gpus[0].total == second.machine.gpus[0].total
    assert alike(first) != alike(second)
