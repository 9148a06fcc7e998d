"""Plans for the fallback engine: what goes where, on how many cards, and what is said of it."""

from __future__ import annotations

from collections import defaultdict

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.plan import Plan, Workload
from turbofit.core.units import GIB, MIB
from turbofit.machine.source import machine_from
from turbofit.memory.engines import check_options, engine_named
from turbofit.model.presets import preset_model
from turbofit.planning.fallback import plan_fallback
from turbofit.planning.resolved_request import Margin, ResolvedRequest


def plan(model="llava-onevision-7b", on="1xrtx3090", **more) -> Plan:
    workload = {k: more.pop(k) for k in ("images", "context", "image_size") if k in more}
    request = ResolvedRequest(
        model=preset_model(model),
        machine=machine_from(on),
        workload=Workload(**workload),
        **more,
    )
    engine = engine_named("transformers")
    check_options(engine, request.engine_options)
    return plan_fallback(request, engine, "LMDeploy 0.18 runs it on no engine").document


def layers_on(made: Plan) -> dict[int | str, list[int]]:
    found: dict[int | str, list[int]] = defaultdict(list)
    for name, where in (made.engines[0].device_map or {}).items():
        if ".layers." in name:
            found[where].append(int(name.rpartition(".")[2]))
    return found


def consistent(made: Plan) -> None:
    """What every ledger must say of itself, through JSON too."""
    assert Plan.from_json(made.to_json()) == made
    for gpu in made.ledgers:
        most = max(term.bytes for term in gpu.terms if term.phase == "transient")
        assert gpu.steady == sum(t.bytes for t in gpu.terms if t.phase != "transient")
        assert gpu.peak == gpu.steady + most
        assert [t.bytes for t in gpu.terms if t.worst] == [most]
        assert gpu.headroom == gpu.total - gpu.reserved - max(gpu.peak, gpu.load_peak)
        assert gpu.fits or not made.fits


def test_one_card_where_one_does():
    for on in ("1xrtx3090", "4xrtx3090"):
        made = plan(on=on)
        consistent(made)
        assert made.fits
        assert made.groups == ((0,),)
        assert set((made.engines[0].device_map or {}).values()) == {0}
        assert made.engines[0].settings.session_len == 32768
        assert made.engines[0].settings.max_batch_size == made.promise.limits.n == 1
        assert "no engine" in made.reasons[0]
        assert any("serial and slower" in text for text in made.warnings)
    assert any("--replicas" in text for text in made.warnings)


def test_a_second_card_is_named_where_it_holds_far_more():
    alone = plan("llama-3.2-11b-vision", "2xrtx4090")
    both = plan("llama-3.2-11b-vision", "2xrtx4090", tp=2)
    assert alone.promise.context * 3 < both.promise.context * 2
    assert f"--tp 2 holds one request of {both.promise.context:,} tokens" in alone.warnings
    little = plan("qwen2-vl-7b", "2xrtx4090")  # 29,696 tokens on one card
    assert not any("--tp 2 holds" in text for text in little.warnings)


def test_two_small_cards_are_cut_once_and_in_order():
    made = plan(on="4xrtx3060")
    consistent(made)
    assert made.fits
    assert made.groups == ((0, 1),)
    placed = made.engines[0].device_map or {}
    assert set(placed.values()) == {0, 1}
    inside = "model.language_model"
    for name in ("model.vision_tower", "model.multi_modal_projector", "model.image_newline",
                 f"{inside}.embed_tokens", f"{inside}.rotary_emb"):  # fmt: skip
        assert placed[name] == 0
    assert placed[f"{inside}.norm"] == placed["lm_head"] == 1
    on = layers_on(made)
    assert on[0] + on[1] == list(range(28))
    # Balanced: no card could take a layer of the other and be the better for it.
    first, second = (gpu.headroom for gpu in made.ledgers)
    assert abs(first - second) < 2 * 478 * MIB


def test_layers_leave_the_cards_only_as_the_last_resort():
    made = plan(on="1xrtx3060,ram=64GiB")
    consistent(made)
    assert made.fits
    on = layers_on(made)
    assert set(on) == {0, "cpu"}
    off = on["cpu"]
    assert off == list(range(off[0], off[-1] + 1))
    assert off[0] > 0
    assert off[-1] < 27
    placed = made.engines[0].device_map or {}
    assert {where for name, where in placed.items() if ".layers." not in name} == {0}
    assert made.host.pageable > len(off) * 400 * MIB
    assert any("s a token at the best" in text for text in made.warnings)
    (gpu,) = made.ledgers
    assert gpu.headroom - gpu.margin < 600 * MIB  # another layer would not fit
    # To disk where host memory does not do.
    poor = plan(on="1xrtx3060:used=6GiB,ram=8GiB")
    assert poor.fits
    assert layers_on(poor)["disk"]
    assert any("read from disk" in text for text in poor.warnings)
    assert poor.host.pageable <= 8 * GIB


def test_it_says_which_gpu_is_short_and_what_helps():
    made, alone = plan(on="1xrtx3060:free=2GiB"), plan(on="1xrtx3060")
    consistent(made)
    assert (made.fits, alone.fits) == (False, True)
    assert "GPU 0 is" in made.verdict
    (freed,) = made.remedies  # no other card need be bought
    assert freed.change == "free the memory that others hold on GPU 0 (9.6 GiB)"
    assert f"one request of {alone.engines[0].settings.session_len:,} tokens" in freed.effect
    longer = plan(on="1xrtx3060:free=6GiB,ram=64GiB", context=32768)
    assert not longer.fits
    changes = [remedy.change for remedy in longer.remedies]
    assert changes[0] == "leave --context to what fits"
    assert "2 x NVIDIA GeForce RTX 3060" not in changes  # the first would still be too small


@pytest.mark.parametrize(
    ("free", "asked", "words"),
    [
        (4, {"context": 32768}, " with --context 32768"),
        (5, {"images": 4, "image_limit": 4_000_000}, " with --images 4 and --max-pixels 4000000"),
        (1, {"context": 32768}, ""),  # nobody's option is at fault where none helps
    ],
)
def test_the_options_at_fault_are_named_first(free, asked, words):
    made = plan("qwen2-vl-2b", f"1xrtx3060:free={free}GiB", **asked)
    named = f"does not fit: Qwen2-VL-2B-Instruct on Transformers{words}: GPU 0 is"
    assert made.verdict.startswith(named)


def test_copies_and_splits_are_never_mixed_by_accident():
    side_by_side = plan(on="2xrtx3090", replicas=2)
    assert side_by_side.fits
    assert side_by_side.groups == ((0,), (1,))
    assert side_by_side.kv_tokens == 2 * side_by_side.engines[0].kv.tokens
    assert not plan(on="4xrtx3060:free=8GiB,ram=6GiB", replicas=2).fits
    both = plan(on="4xrtx3060", replicas=2, tp=2)
    assert both.fits
    assert sorted(index for group in both.groups for index in group) == [0, 1, 2, 3]
    assert all(len(group) == 2 for group in both.groups)
    assert plan(on="2xrtx3090", tp=2).groups == ((0, 1),)
    with pytest.raises(UsageError, match="4 GPUs are needed, 2 are visible"):
        plan(on="2xrtx3090", replicas=2, tp=2)
    slices = machine_from("4xa100-80g:mig=1g.10gb")
    assert all(len(group) == 1 for group in plan(on=slices).groups)
    with pytest.raises(UsageError, match="would split a model over MIG slices"):
        plan(on=slices, tp=2)


def test_v100_gets_float16_and_pays_for_the_matrix():
    made = plan("qwen2-vl-7b", "1xv100-32g")
    consistent(made)
    assert made.fits
    assert made.engines[0].settings.dtype == "float16"
    assert (made.promise.limits.max_pixels_per_image or 0) < 12845056
    assert any("before Ampere" in text for text in made.reasons)
    with pytest.raises(UsageError, match="bfloat16"):
        plan("qwen2-vl-7b", "1xv100-32g", engine_options={"dtype": "bfloat16"})


def test_what_the_user_sets_stays_and_is_named():
    made = plan("qwen2-vl-7b", "1xrtx3090", context=4096, image_limit=1003520)
    assert made.engines[0].settings.session_len == 4096
    assert made.promise.limits.max_pixels_per_image == 1003520
    assert any("image limit 1003520: as set by you" in text for text in made.reasons)
    stated = plan("qwen2-vl-7b", "1xrtx3090", image_size=(448, 448))
    # 1024 patches; the model folder's own limit holds larger images down to them.
    assert stated.promise.limits.units_per_image <= 1024
    assert stated.promise.limits.max_pixels_per_image == 200704
    short = plan(
        "qwen2-vl-7b", "1xrtx3060", engine_options={"session_len": 32768}, image_limit=1003520
    )
    assert short.engines[0].settings.session_len == 32768
    below = plan("qwen2-vl-7b", image_size=(200, 200), image_limit=1_000_000)
    assert any("what images of the given size take" in text for text in below.reasons)


@pytest.mark.parametrize(
    ("model", "fixed", "words"),
    [
        ("llava-onevision-7b", {"cache_max_entry_count": 0.5}, "--cache-max-entry-count"),
        ("llava-onevision-7b", {"max_batch_size": 4}, "one request at a time"),
        ("internvl2-8b", {}, "InternVLChatModel"),
        ("qwen2-vl-7b-awq", {}, "awq"),
    ],
)
def test_what_it_cannot_do_is_refused(model, fixed, words):
    with pytest.raises(UsageError, match=words):
        plan(model, engine_options=fixed)


def test_the_largest_image_is_no_less_a_promise_than_a_smaller_one():
    """Layers leave the card for it, where without a word its pixels are halved."""
    short = "1xrtx3090:free=19GiB,ram=64GiB"
    unstated, stated = (plan("qwen2-vl-7b", on=short, image_size=s) for s in (None, (9000, 9000)))
    assert unstated.promise.limits.units_per_image < 65536 == stated.promise.limits.units_per_image
    assert not unstated.workload.image_size
    assert "cpu" in (stated.engines[0].device_map or {}).values()


@pytest.mark.parametrize(("more", "most"), [({"images": 40}, 3176), ({"context": 1000}, 3500)])
def test_images_are_lowered_to_what_a_short_context_holds(more, most):
    """Four halves were too large, and it was said not to fit; 31,744 tokens are 40 of 793."""
    made = plan("qwen2-vl-7b", on="1xa100-40g", **more)
    assert made.fits
    assert 0.95 * most <= made.promise.limits.units_per_image <= most
    assert made.promise.limits.image_tokens_per_request < made.engines[0].settings.session_len
    smaller = plan("qwen2-vl-7b", **more)  # before layers leave the card
    assert smaller.fits
    assert "cpu" not in (smaller.engines[0].device_map or {}).values()


def test_less_free_memory_means_less_context_and_never_more():
    lengths = []
    for used in range(0, 8 * GIB, GIB):
        made = plan(on=f"1xrtx3090:used={used}")
        consistent(made)
        lengths.append(made.engines[0].settings.session_len)
    assert lengths == sorted(lengths, reverse=True)
    made = plan(margin=Margin(bytes=4 * GIB))
    assert all(gpu.headroom >= 4 * GIB for gpu in made.ledgers)
    assert plan(budget=20 * GIB).ledgers[0].peak <= 20 * GIB
