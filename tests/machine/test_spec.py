"""A machine in words: what a SPEC means, what is refused, and whatever a person types."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import hostile
from turbofit.core.errors import UsageError
from turbofit.core.messages import neighbours
from turbofit.core.struct import NA
from turbofit.core.units import GIB, MIB, parse_bytes
from turbofit.machine.presets import load_preset, nominal_gigabytes, preset_names
from turbofit.machine.source import check_possible
from turbofit.machine.spec import MAX_GPUS, parse_spec
from turbofit.planning.commands import read_map
from turbofit.planning.request import PlanRequest


def test_plain_group():
    machine = parse_spec("4xrtx3090")
    assert machine.source == "preset"
    assert tuple(gpu.index for gpu in machine.gpus) == machine.visible == (0, 1, 2, 3)
    assert len({gpu.uuid for gpu in machine.gpus}) == 4
    gpu = machine.gpus[3]
    assert gpu.total == 24576 * MIB == gpu.reserved + gpu.used + gpu.free
    assert (gpu.used, gpu.holders, gpu.sm_count) == (0, (), 82)
    assert len(machine.links) == 6
    assert not any(link.peers or link.nvlinked for link in machine.links)
    assert (machine.host.ram_total, machine.warnings) == (NA, ())


@pytest.mark.parametrize(
    ("spec", "count", "name"),
    [
        ("4x 3090", 4, "3090"), ("2*a100 80gb sxm", 2, "80GB"), ("2xl4:free=19GiB", 2, "L4"),
        ("2x4070s", 2, "4070 SUPER"), ("2xl40s", 2, "L40S"), ("geforce3090", 1, "3090"),
        ("RTX 4090 (24GB)", 1, "4090"), ("NVIDIA L4 23034 MiB", 1, "L4"),
    ],
)  # fmt: skip
def test_a_count_as_people_write_it(spec, count, name):
    gpus = parse_spec(spec).gpus
    assert len(gpus) == count
    assert gpus[0].name.endswith(name)


def test_shares_and_separators():
    usable = 23034 * MIB - 475 * MIB
    assert parse_spec("l4:free=80%").gpus[0].free == int(usable * 0.8)
    # Of used more counts: a share of the whole card.
    assert parse_spec("l4:used=20%").gpus[0].free == usable - int(23034 * MIB * 0.2)
    machine = parse_spec("2xl4:free=19456MiB,ram=65536 MiB")
    assert (machine.gpus[1].free, machine.host.ram_total) == (19456 * MIB, 64 * GIB)


def test_a_slice_has_its_own_memory_and_its_share_of_the_card():
    whole = load_preset("a100-80g")
    machine = parse_spec("NVIDIA A100-SXM4-80GB MIG 3g.40gb+2xa100-80g:mig=1g.10gb:free=50%")
    first, second, _ = machine.gpus
    assert (first.total, first.free, first.sm_count) == (40192 * MIB, 40192 * MIB, 42)
    assert first.mig
    assert first.compute_capability == (8, 0)
    assert first.dense_flops == whole.dense_flops.value * 42 // 108
    assert 0.49 < first.memory_bandwidth / whole.memory_bandwidth.value < 0.5
    assert (second.total, second.free) == (9728 * MIB, 4864 * MIB)
    assert not any(link.peers or link.nvlinked for link in machine.links)
    assert "a100-80g:total=40192MiB with 42 of 108 SMs" in machine.warnings[0]


@pytest.mark.parametrize(
    ("spec", "total", "capability"),
    [
        ("24GB", int(24 * 0.9 * 1024) * MIB, NA), ("2x24g:sm=86", 22118 * MIB, (8, 6)),
        ("80 GB:sm=sm_90a", 73728 * MIB, (9, 0)), ("24.0GB", 22118 * MIB, NA),
        ("titanrtx:total=23GiB", 23 * GIB, (7, 5)), ("fooboard:total=24GiB", 24 * GIB, NA),
        ("24GB:total=23GiB", 23 * GIB, NA), ("2xfooboard:total=24GiB:sm=12.0", 24 * GIB, (12, 0)),
        ("rtx4090 Laptop GPU:total=15GiB", 15 * GIB, (8, 9)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU 16376 MiB", int(16376 * 0.9) * MIB, (8, 9)),
    ],
)  # fmt: skip
def test_any_card_is_its_memory_alone_and_says_so(spec: str, total: int, capability):
    machine = parse_spec(spec)
    gpu = machine.gpus[-1]
    assert (gpu.total, gpu.reserved, gpu.compute_capability) == (total, 0, capability)
    assert (gpu.sm_count, gpu.memory_bandwidth, gpu.dense_flops, gpu.l2) == (NA, NA, NA, NA)
    assert "has no preset: it was read as any card" in machine.warnings[0]
    assert "in speed as a slow card" in machine.warnings[0]


def test_any_card_of_a_size_has_no_more_than_the_known_cards_of_that_size():
    for key in preset_names():
        preset = load_preset(key)
        any_card = parse_spec(f"{nominal_gigabytes(key)}GB").gpus[0]
        assert any_card.total <= preset.total - preset.reserved, key


def test_links_and_ram_and_cores():
    machine = parse_spec("4xrtx3090,nvlink=0-2+3-1")
    joined = {(link.a, link.b) for link in machine.links if link.nvlinked}
    assert joined == {(0, 2), (1, 3)}
    assert {(link.a, link.b) for link in machine.links if link.peers} == joined
    assert machine.link(0, 2).nvlinks == 4
    assert machine.link(0, 2).nvlink_bandwidth == 4 * 14_062_500_000
    assert machine.link(0, 1).nvlink_bandwidth == NA
    machine = parse_spec("2xrtx4090,p2p=none,ram=64GiB")
    assert machine.host.ram_total == machine.host.ram_available == 64 * GIB
    assert (machine.host.cpus, parse_spec("2xrtx4090,p2p=none,cores=16").host.cpus) == (NA, 16)
    for spec, peers in (("2xrtx4090,p2p=none", False), ("2xrtx4090,p2p=all", True)):
        assert parse_spec(spec).links[0].peers is peers
    assert not parse_spec("2xl4,P2P=none").links[0].peers
    # What a name leaves open is a warning, said once.
    assert "80g" in parse_spec("a100").warnings[0]
    assert parse_spec("2xh100+2xh100").warnings == (parse_spec("2xh100").warnings[0],)


@pytest.mark.parametrize(
    ("spec", "cause", "hint"),
    [
        ("", "no name of a card", "4xrtx3090"),
        ("4x", "no GPU preset is called '4x'", "2xNAME"),
        ("☃", "no GPU preset", "`turbofit gpus` lists"),
        ("1", "no card's name", "--gpus 0,1"),
        ("4xrtx3900", "rtx3900", "rtx3090"),
        ("rtx3090+", "no name of a card", "4xrtx3090"),
        ("0xl4", "0xl4: no such group", "1 to 64"),
        ("9999999999999xl4", "xl4", "`turbofit gpus` lists"),
        ("64xl4+l4", "65 GPUs", "64"),
        ("l4:free=", "'free=' is no key", "free=19GiB"),
        ("l4:memory=2GiB", "'memory=2GiB' is no key", "total"),
        ("l4:free=19", "free of l4: 19 bytes?", "for 19 GiB write 19GiB"),
        ("l4,ram=64", "ram: 64 bytes?", "64GiB"),
        ("rtx3090 16GB", "rtx3090 has 24 GB", "rtx3090:total="),
        ("l4:free=120%", "free of l4 '120%' is no share", "2%"),
        ("rtx3090:sm=8.6", "has a preset with this figure", "leave sm out"),
        ("24GB:sm=new", "no compute capability", "sm=8.6"),
        ("a100-80g:mig=5g.40gb", "no MIG profile 5g.40gb", "3g.40gb"),
        ("2xa100-80g:mig=3g.40gb,p2p=all", "MIG slices have no peers", "leave p2p out"),
        ("2xa100-80g:mig=3g.40gb,nvlink=0-1", "no NVLink", "leave the pair out"),
        ("rtx3090:18GB", "'18GB' is no key", "18GB is free=18GB, or total=18GB"),
        ("l4:20GiB", "'20GiB' is no key", "20GiB is free=20GiB, or total=20GiB"),
        ("l4:free=99GiB", "more than the", "total"),
        ("l4:used=1GiB:free=1GiB", "do not add up", "only one"),
        ("2xrtx3090,nvlink=0", "not a pair", "0-1+2-3"),
        ("2xrtx3090,nvlink=0-1,p2p=none", "contradicts", "leave out"),
        ("2xrtx3090,ecc=on", "'ecc=on' is no machine option", "cores=16"),
        ("2xrtx3090:total=24GiB,used=4GiB", "'used=4GiB' is no", "joins the keys of a card"),
        ("rtx3090,cores=0", "cores=0", "cores=16"),
        ("rtx3090,cores=2.5", "cores=2.5", "cores=16"),
    ],
)
def test_mistyped_specs(spec: str, cause: str, hint: str):
    with pytest.raises(UsageError) as caught:
        parse_spec(spec)
    assert cause in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)


_GROUPS = st.tuples(
    st.sampled_from(preset_names()), st.integers(1, 4), st.none() | st.floats(0.01, 1),
    st.sampled_from(["", ":used={used}B", ":free={free}B", ":free={free}B:used={used}B"]),
    st.floats(0, 1),
)  # fmt: skip


@given(st.lists(_GROUPS, min_size=1, max_size=4))
def test_sizes_always_add_up(groups):
    texts, expected = [], []
    for key, count, part, form, share in groups:
        preset = load_preset(key)
        usable = int(preset.total * part) if part else preset.total - preset.reserved
        used = int(usable * share) if form else 0
        total = f":total={usable}B" if part else ""
        texts.append(f"{count}x{key}{total}" + form.format(used=used, free=usable - used))
        expected += [(usable, used)] * count
    machine = parse_spec("+".join(texts))
    assert [(gpu.used + gpu.free, gpu.used) for gpu in machine.gpus] == expected
    for gpu in machine.gpus:
        assert gpu.total == gpu.reserved + gpu.used + gpu.free
    assert len(machine.links) == len(machine.gpus) * (len(machine.gpus) - 1) // 2


OPTIONS = ("image_size", "margin", "budget", "context", "tp", "replicas", "gpus", "images")


@hostile("specs")
def test_a_text_is_refused_or_what_it_means_is_possible(data: bytes) -> None:
    kind, text = data[:1], data[1:].decode("utf-8", "replace")
    number = kind[0] if kind else 0
    try:
        if number % 4 == 0:
            machine = parse_spec(text)
            assert 1 <= len(machine.gpus) <= MAX_GPUS
            check_possible(machine, "the machine")
        elif number % 4 == 1:
            assert parse_bytes(text, what="a size") >= 0
        elif number % 4 == 2:
            read_map("{" + text)
        else:
            option = OPTIONS[number // 4 % len(OPTIONS)]
            PlanRequest.of_options({"model": "m", "on": "rtx3090", option: text}, str)
    except UsageError as exc:
        refused = exc
    else:
        return
    assert refused.message
    assert refused.hint
    assert "\n" not in refused.message


OTHER_FORMS = [
    ("4090x2", "2x4090"), ("3090x4", "4x3090"), ("L4 x 4", "4xL4"), ("a100-80g * 2", "2xa100-80g"),
    ("\u4e24\u5f204090", "2x4090"), ("8\u5361A100", "8xA100"), ("\u56db\u5f203090", "4x3090"),
    ("\u516b\u5361A100", "8xA100"),
    ("3090 (5GB used)", "3090:used=5GB"), ("4090 with 18GB free", "4090:free=18GB"),
    ("rtx 4090, rtx 4090", "rtx 4090+rtx 4090"), ("rtx3090,4090", "rtx3090+4090"),
    ("2xl4:free=18GB,10GB", "l4:free=18GB+l4:free=10GB"), ("autodl 4090", "4090"),
    ("colab T4", "T4"), ("2 4090s", "2x4090"), ("two 3090s", "2x3090"), ("2 L40S", "2xL40S"),
    ("\u5355\u5f204090", "1x4090"), ("3090 2\u5f20", "2x3090"), ("3090 and 4090", "3090+4090"),
    ("\u4e24\u5f203090\u548c\u4e00\u5f204090", "2x3090+1x4090"), ("4 3090", "4x3090"),
    ("3090 free 18GB", "3090:free=18GB"), ("3090 (6GB used by Xorg)", "3090:used=6GB"),
    ("3090x2,nvlink=0-1", "2x3090,nvlink=0-1"), ("dual 3090", "2x3090"),
    ("3090, 3090,4090", "3090+3090+4090"),
    ("RTX3090*2 + RTX4090", "2xRTX3090+RTX4090"),
    ("2x4090 (20GB free each)", "2x4090:free=20GB"), ("two 4090s and one 3090s", "2x4090+1x3090"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "read"), OTHER_FORMS)
def test_a_form_that_can_only_mean_one_machine_is_read_and_said(typed: str, read: str) -> None:
    machine, same = parse_spec(typed), parse_spec(read)
    assert machine.warnings[0] == f"{typed} was read as {read}"
    assert (machine.gpus, machine.name) == (same.gpus, same.name)


def test_each_form_has_an_example() -> None:
    for form, _ in neighbours()["specs"]:
        texts = [part for typed, _ in OTHER_FORMS for part in (typed, typed.removeprefix("two "))]
        assert any(re.fullmatch(form, text, re.IGNORECASE) for text in texts), form


NO_MACHINES = ["internvl2-8b", "x2", "2x", "4090 x 99", "rtx", "l4:free=2GB,1GB", "3090:18GB"]
#: Texts with as many parts as another form may have, and with more.
LONG_TEXTS = ["x\u3001" * 200, "x\u3001" * 500, "x\u3001" * 500 + "\nx"]


@pytest.mark.parametrize("text", NO_MACHINES + LONG_TEXTS)
def test_what_means_no_machine_stays_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_spec(text)
