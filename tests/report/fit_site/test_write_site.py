"""What may be asked of the site, its answers, and its files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.report.documents import planned
from tests.support.processes import gone
from turbofit.core.errors import UsageError
from turbofit.core.units import GIB, KIB, MIB, format_bytes, three_digits
from turbofit.report.fit_site import site as module
from turbofit.report.fit_site.choices import SiteRequest, choices_of, points
from turbofit.report.fit_site.site import answer_of, index_page, refused, table_of, write_site


@pytest.mark.parametrize("text", ["x", "4@", "@1x1", "4@wide", "-1", "4@12"])
def test_images_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        SiteRequest.of_options({"images": (text,)}, str)


def test_the_default_is_whole_and_all_has_more() -> None:
    few, more = (SiteRequest.of(all=every, contexts=(4096,)).complete() for every in (False, True))
    assert (few.used, few.images, few.contexts) == ((), ((1, (1920, 1080)),), (4096,))
    assert (more.used, more.contexts) == ((2 * GIB,), (4096,))
    assert more.images == ((1, (1920, 1080)), (4, (1280, 720)))
    short, choices = (choices_of(SiteRequest.of(all=every), "today") for every in (False, True))
    assert short.answers == 10 * 11 * 3 * 2
    assert choices.answers == 10 * 11 * 3 * 2 * 3 * 3 * 3
    assert choices.answers == len(choices.models) * len(choices.cards) * len(list(points(choices)))
    assert [one.key for one in choices.used] == ["0", "2GiB"]
    assert [one.key for one in choices.images] == ["1@1920x1080", "1", "4@1280x720"]
    assert [one.key for one in choices.contexts] == ["auto", "8192", "32768"]
    card = choices.cards[0]
    assert card.title == "NVIDIA GeForce RTX 3060"
    assert 0 < card.free < card.total == 12 * GIB


def test_each_point_is_what_its_words_say() -> None:
    """The words stand on the page, the request was planned: they are the same."""
    choices = choices_of(SiteRequest.of(used=(3 * GIB + MIB, 1000)), "today")
    for point in points(choices):
        request = point.request("internvl3-8b", "l4")
        given = request.option_arguments(without=("model", "on"))
        words = " ".join((point.images.words, point.context.words, point.concurrency.words))
        assert sorted(given) == sorted(shlex.split(words))
        assert request.on == f"{point.gpus}xl4{point.used.words}"
    assert [one.words for one in choices.used] == ["", ":used=1000B", ":used=3073MiB"]


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"models": ("internvl9-8b",)}, "'internvl9-8b' is no model by name"),
        ({"cards": ("rtx4091",)}, "'rtx4091' is no card by name"),
        ({"counts": (1, 99)}, "99xrtx3060"),
        ({"cards": ("h100", "rtx3060"), "used": ("20GiB",)}, "more than the 11.6 GiB"),
    ],
)
def test_what_no_table_could_answer(values: dict[str, tuple[object, ...]], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        choices_of(SiteRequest.of(**values), "today")


def test_every_name_that_plan_takes_is_offered_once() -> None:
    request = SiteRequest.of(
        models=("OpenGVLab/InternVL2-2B", "mineru2.5", "internvl2-2b"),
        cards=("rtx3090", "3090", "RTX 4090"),
    )
    choices = choices_of(request, "today")
    assert [one.name for one in choices.models] == ["internvl2-2b", "mineru2.5-1.2b"]
    assert [one.name for one in choices.cards] == ["rtx3090", "rtx4090"]


def test_a_refusal_is_an_answer_too() -> None:
    """So many images fit no context of the model; and what does not fit holds nothing."""
    request = SiteRequest.of(
        models=("llava-1.5-7b",), cards=("rtx4090",), counts=(1,), used=(0,),
        images=((99, None),), contexts=(4096,), concurrencies=(8,),
    )  # fmt: skip
    table = table_of(choices_of(request, "today"), "llava-1.5-7b", "rtx4090")
    answer = table.answers[table.order[-1]]
    assert not answer.fits
    assert "99" in answer.verdict
    answer = refused(UsageError("no", hint="do this"))
    assert (answer.verdict, answer.memory) == ("no; do this", None)
    answer = answer_of(msgspec.structs.replace(planned("fits"), fits=False))
    assert (answer.kv_tokens, answer.requests_at_once, answer.throughput) == (0, 0, None)


def test_a_worker_ends_with_its_parent() -> None:
    begun = (
        "import os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from turbofit.report.fit_site.site import begin_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=begin_worker)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", begun], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    assert gone(worker)


FOLDER = Path(module.__file__).parent


def test_the_page_runs_its_own_script_and_what_that_loads() -> None:
    text = index_page(choices_of(SiteRequest.of(), "today"))
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' 'strict-dynamic'; " in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def test_both_languages_say_the_same_things() -> None:
    text = (FOLDER / "wording.js").read_text(encoding="utf-8")
    english, chinese = text.split("  zh: {")
    names = r"(\w+): (?:'((?:[^'\\]|\\.)*)'|\[)"
    pairs = [re.findall(names, part) for part in (english, chinese)]
    said = [dict(part) for part in pairs]
    assert list(map(len, pairs)) == list(map(len, said))  # no name twice
    assert list(said[0]) == list(said[1])
    assert len(said[0]) > 50
    for name, sentence in said[0].items():
        places = [set(re.findall(r"\{\d\}", one)) for one in (sentence, said[1][name])]
        assert places[0] == places[1], name
    used = set(re.findall(r"say\('(\w+)'", "".join(
        (FOLDER / name).read_text(encoding="utf-8") for name in ("answer.js", "site.js")
    )))  # fmt: skip
    shown = re.findall(r'data-text="(\w+)"', (FOLDER / "index.html").read_text(encoding="utf-8"))
    assert (used | set(shown)) <= set(said[0])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    request = SiteRequest.of(
        models=("internvl3-2b",), cards=("rtx4090",), counts=(1,), used=(0,), images=((1, None),)
    )
    with pytest.raises(UsageError, match="cannot be made"):
        write_site(request, tmp_path, say=str, jobs=1)


NODE = shutil.which("node")


def told(expression: str) -> Any:
    """What an expression is, beside the site's scripts that touch no page."""
    assert NODE is not None
    scripts = "".join((FOLDER / name).read_text("utf-8") for name in ("wording.js", "answer.js"))
    asked = f"{scripts}\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run([NODE, "-"], input=asked, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="no Node is installed here")
def test_sizes_and_rates_read_as_in_the_terminal() -> None:
    sizes = [0, 1, 1023, KIB, 1280 * MIB, 1792 * MIB, 2304 * MIB, 99 * GIB + 256 * MIB]
    sizes += [200 * MIB + 512 * KIB, 201 * MIB + 512 * KIB, 1177 * MIB, 12 * GIB - 1, 100 * GIB]
    assert told(f"{sizes}.map(bytes)") == [format_bytes(size) for size in sizes]
    rates = [0.857142, 26.71, 999.4, 999.6, 1133.7, 242176.0]
    assert told(f"{rates}.map(three)") == [three_digits(rate) for rate in rates]
    # Nor can a link name a language that is none.
    names = ["constructor", "toString", "__proto__", "fr"]
    assert told(f"{names}.map((name) => Boolean(WORDING[name]))") == [False] * 4
