from __future__ import annotations

import shlex

import msgspec
import pytest

from tests.support.plans import ledger, machine, plausible_plan
from turbofit.core.machine import CardSpeed, Holder, Link, Measured, PairSpeed, ReduceSpeed
from turbofit.core.messages import indices
from turbofit.core.plan import Command, Remedy
from turbofit.core.struct import NA
from turbofit.core.units import MIB
from turbofit.report.painters import markdown, terminal
from turbofit.report.painters.document import Code, Table
from turbofit.report.views.figures import shell_words
from turbofit.report.views.machine_view import machine_view
from turbofit.report.views.memory_view import fold
from turbofit.report.views.plan_view import plan_view


def test_equal_gpus_share_a_column_and_others_do_not() -> None:
    plan = plausible_plan()
    assert [title for title, _ in fold(plan.gpus)] == ["GPU 0", "GPU 1-3"]
    other = msgspec.structs.replace(ledger(2), name="NVIDIA GeForce RTX 4090")
    titles = [title for title, _ in fold((ledger(0), ledger(1), other, ledger(3)))]
    assert titles == ["GPU 0-1,3", "GPU 2"]


def test_the_plan_at_eighty_columns() -> None:
    plan = plausible_plan()
    blocks = plan_view(plan)
    text = terminal.paint([block for block in blocks if not isinstance(block, Code)])
    assert max(map(len, text.splitlines())) <= 80
    for word in (
        "fits", "cache_max_entry_count", "0.873", "the largest that leaves the margin", "kv_cache",
        "17,000.0", "GPU 1-3", "vision *", "headroom", "544,000 tokens", "the longest request",
        "Considered", "why not", "GPUs cannot reach each other directly",
    ):  # fmt: skip
        assert " ".join(word.split()) in " ".join(text.split()), word


def test_the_shell_reads_the_command_back() -> None:
    command = Command(
        env={"A": "b c", "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"},
        argv=("lmdeploy", "serve", "api_server", "/models/it's here", "--flag", "--x", "1 2", "-$"),
        group=0,
    )
    words = shlex.split(shell_words(command.argv, command.env).replace("\\\n", ""))
    env = [f"{name}={value}" for name, value in command.env.items()]
    assert words == [*env, *command.argv]


def test_markdown_tables_are_whole_and_names_cannot_break_them() -> None:
    evil = plausible_plan(
        warnings=("a | b\n# c <script>",), remedies=(Remedy(change="x|y", effect="`z`"),)
    )
    text = markdown.paint(plan_view(evil))
    assert text.startswith("# internvl2-8b on 4xrtx3090\n\n**fits**")
    assert "<script>" not in text
    assert "| x\\|y | \\`z\\` |" in text
    tables = [block for block in plan_view(evil) if isinstance(block, Table) and block.whole]
    for table in tables:
        columns = len(table.columns)
        painted = markdown.paint([table]).replace("\\|", "")
        assert {line.count("|") for line in painted.splitlines()} == {columns + 1}


def test_a_fence_in_the_code_does_not_end_it() -> None:
    text = markdown.paint([Code("echo ```")])
    assert text.startswith("````sh")


def test_control_characters_of_others_never_reach_a_terminal_by_markdown() -> None:
    text = markdown.paint([Code("serve '\x1b]0;owned\x07'\nnext \u202eline")])
    assert text == "```sh\nserve '?]0;owned?'\nnext ?line\n```\n"


def test_a_measured_machine_shows_what_cards_and_links_reached() -> None:
    pairs = tuple(
        PairSpeed(
            source=a, target=1 - a, peer=a == 0, right=a == 0, bandwidth=2.2e10, latency=9e-6,
            host_bandwidth=8e9,
        )
        for a in (0, 1)
    )  # fmt: skip
    found = Measured(
        torch="2.9",
        cards=(CardSpeed(index=0, bandwidth=8.41e11, flops=6.1e13),),
        pairs=pairs,
        reduces=(ReduceSpeed(gpus=(0, 1), size=8192, seconds=2.1e-5, right=True),),
        left_out=("pair of [1, 0]: no time left",),
    )
    text = terminal.paint(machine_view(msgspec.structs.replace(machine(2), measured=found)))
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "841", "61.0"] in lines
    assert ["0-1", "22.0", "8.0", "9.0", "peer", "access"] in lines
    assert ["1-0", "22.0", "8.0", "9.0", "wrong", "data"] in lines
    assert ["0+1", "8,192", "21", "right"] in lines
    assert "no time left" in text


def test_the_machine() -> None:
    holder = Holder(pid=4711, name="python", bytes=3 * 1024 * MIB)
    cards = list(machine(3).gpus)
    cards[2] = msgspec.structs.replace(cards[2], holders=(holder,), free=NA, mig=True)
    links = (
        Link(a=0, b=1, p2p_read=True, p2p_write=True, nvlinks=4),
        Link(a=0, b=2, p2p_read=False, p2p_write=False, ancestor="node"),
        Link(a=1, b=2, p2p_read=True, p2p_write=False, ancestor="system"),
    )
    seen = msgspec.structs.replace(
        machine(3), gpus=tuple(cards), links=links, visible=(0, 1), warnings=("odd",)
    )
    text = terminal.paint(machine_view(seen))
    lines = text.splitlines()
    assert "4711" in text
    assert "3,072.0" in text
    assert "odd" in text
    links = lines[lines.index("Links") + 1 :][:3]
    assert links == [
        "  - 1 pair (0-1): NVLink, 4 lanes",
        "  - 1 pair (0-2): no peer access, through host memory (in a NUMA node)",
        "  - 1 pair (1-2): peer access one way alone (between NUMA nodes)",
    ]
    assert "(not visible)" in text
    assert "NA" in text
    assert "nobody" in terminal.paint(machine_view(machine(1)))


def test_a_generation_of_pcie_that_could_not_be_read_is_na_alone() -> None:
    (card,) = machine(1).gpus
    known = msgspec.structs.replace(card.pcie, generation=NA, width=16)
    seen = msgspec.structs.replace(machine(1), gpus=(msgspec.structs.replace(card, pcie=known),))
    assert "NA x16" in terminal.paint(machine_view(seen))


@pytest.mark.parametrize(
    ("gpus", "text"), [((), ""), ((3,), "3"), ((2, 0, 1), "0-2"), ((0, 2, 3, 5), "0,2-3,5")]
)
def test_indices(gpus: tuple[int, ...], text: str) -> None:
    assert indices(gpus) == text
