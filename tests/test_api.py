"""Our users' stories and the doors for programs."""

from __future__ import annotations

import copy
import html
import inspect
import json
import pickle
import pydoc
import sys
import traceback
from pathlib import Path

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.cli.main import main
from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.core.struct import to_json
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from
from turbofit.planning.which import Serving, Which
from turbofit.serving.pipeline import open_pipeline


class TestPlan:
    """`plan` as programs use it."""

    def test_it_is_printed_as_the_terminal_shows_it(self, capsys):
        plan = turbofit.plan("internvl2-2b", on="1xrtx3090")
        assert main(["plan", "internvl2-2b", "--on", "1xrtx3090"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"{plan}\n")
        assert shown.count("\n") - str(plan).count("\n") == 2  # but for the line on options
        assert plan._repr_html_() == f"<pre>{html.escape(str(plan))}</pre>"

    def test_other_answers_are_printed_as_the_terminal_shows_them(self, capsys, tmp_path):
        log = tmp_path / "log"
        log.write_text("CUDA out of memory. Tried to allocate 20 MiB")
        for answer, words in (
            (turbofit.which(on="1xl4", images=0), ["which", "--on", "1xl4", "--images", "0"]),
            (turbofit.diagnose(log), ["diagnose", str(log)]),
        ):
            main(words)
            assert capsys.readouterr().out.startswith(str(answer))
            assert answer._repr_html_() == f"<pre>{html.escape(str(answer))}</pre>"

    def test_a_path_is_a_model(self, tmp_path):
        assert turbofit.plan(Path("internvl2-2b"), on="1xrtx3090").fits
        with pytest.raises(UsageError, match="no folder"):
            turbofit.plan(tmp_path / "none", on="1xrtx3090")

    def test_nvlinked_cards_go_together(self):
        plan = turbofit.plan("internvl2-26b-awq", on="4xrtx3090,nvlink=0-2+1-3", tp=2)
        assert {tuple(sorted(group)) for group in plan.groups} == {(0, 2), (1, 3)}
        # MIG instances are never joined.
        machine = machine_from("2xa100-40g")
        slices = tuple(replace(gpu, mig=True) for gpu in machine.gpus)
        machine = replace(machine, gpus=slices, links=())
        assert turbofit.plan("internvl2-8b", on=machine).tp == 1

    def test_what_the_user_sets_is_kept_and_named_as_the_cause(self):
        kept = {"engine": "turbomind", "cache_max_entry_count": 0.8, "queue_images": False}
        plan = turbofit.plan("qwen2-vl-7b", on="1xrtx3090", max_pixels=12845056, **kept)
        assert plan.engines[0].settings.cache_max_entry_count == 0.8
        assert plan.promise.limits.max_pixels_per_image == 12845056
        assert not plan.fits
        assert "leave --cache-max-entry-count to turbofit" in [one.change for one in plan.remedies]
        # Images that nobody sets are lowered where nothing else serves.
        plan = turbofit.plan("qwen2-vl-7b", on="1xrtx3090", **kept)
        assert plan.fits
        assert (plan.promise.limits.max_pixels_per_image or 1 << 30) < 12845056
        assert any("the largest that can be served" in reason for reason in plan.reasons)

    def test_budgets_and_margins(self):
        plan = turbofit.plan("internvl2-2b", on="1xrtx3090", budget="10GiB")
        assert plan.fits
        ledger = plan.ledgers[0]
        assert ledger.peak - ledger.used + 256 * MIB <= 10 * 1024 * MIB
        # Margins are bytes or shares.
        for margin, expected in (("1GiB", 1024 * MIB), ("5%", None), (600 * MIB, 600 * MIB)):
            ledger = turbofit.plan("internvl2-2b", on="1xrtx3090", margin=margin).ledgers[0]
            assert ledger.margin == (expected or int(ledger.total * 0.05))
            assert ledger.headroom >= ledger.margin

    @pytest.mark.parametrize(
        ("model", "keywords", "hint"),
        [
            ("qwen2-vl-7b", {"max_dynamic_patch": 4}, "or give max_pixels"),
            ("internvl2-8b", {"max_pixels": 10**6}, "or give max_dynamic_patch"),
            ("llama-3.2-11b-vision", {"max_dynamic_patch": 2}, "leave it out"),
            ("internvl2-8b", {"max_dynamic_patch": 99, "images": 0}, "or serve images"),
            ("internvl2-8b", {"max_dynamic_patch": 9, "language_model_only": True}, "or serve"),
        ],
    )
    def test_a_limit_that_these_images_have_not_is_refused(self, model, keywords, hint):
        with pytest.raises(UsageError, match="limits") as caught:
            turbofit.plan(model, on="4xrtx3090", **keywords)
        assert hint in caught.value.hint

    def test_limits_that_nothing_could_keep_are_refused(self):
        with pytest.raises(UsageError, match="no image of LLaVA-OneVision-7B has more than 36"):
            turbofit.plan("llava-onevision-7b", on="4xrtx3090", max_dynamic_patch=99)
        with pytest.raises(UsageError, match="a session of 1 tokens is shorter than"):
            turbofit.plan("llama-3.1-8b", on="1xrtx3090", context=1)


def test_a_plan_for_transformers_has_no_config_of_lmdeploy_and_is_not_corrected():
    plan = turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", engine="transformers")
    assert repr(plan).startswith(
        "<Plan: Qwen2.5-VL-7B-Instruct on 1xrtx3090, transformers, tp 1 x 1, "
    )
    with pytest.raises(UsageError, match="this engine is Transformers"):
        plan.engine_config()
    assert set(plan.engines[0].lmdeploy_settings()) == {"dtype", "max_batch_size", "session_len"}
    with pytest.raises(UsageError, match="no ratio to correct"):
        turbofit.plan("qwen2.5-vl-7b", on="1xrtx3090", engine="transformers", rehearse=True)
    with pytest.raises(UsageError, match="no stand-in checkpoint"):
        turbofit.rehearse("llava-v1.6-vicuna-7b", on="1xrtx3090")


def test_a_plan_that_does_not_fit_gives_no_config() -> None:
    plan = turbofit.plan("internvl2-26b", on="1xrtx3090")
    with pytest.raises(DoesNotFitError) as caught:
        plan.engine_config()
    assert caught.value.message == plan.verdict
    assert "plan.remedies" in caught.value.hint


@pytest.mark.lmdeploy
def test_engine_config_is_lmdeploys_own():
    plan = turbofit.plan("internvl2-8b", on="4xrtx3090", tp=4)
    config = plan.engine_config()
    assert (type(config).__name__, config.tp) == ("TurbomindEngineConfig", 4)
    assert config.cache_max_entry_count == plan.engines[0].settings.cache_max_entry_count
    assert config.session_len == plan.engines[0].settings.session_len


def test_a_tab_finds_what_the_package_is_for() -> None:
    """`dir` is what rlcompleter, IPython and jedi's interpreter offer behind ``turbofit.``."""
    import rlcompleter

    assert dir(turbofit) == sorted(turbofit.__all__)
    found = rlcompleter.Completer({"turbofit": turbofit}).attr_matches("turbofit.pl")
    assert found == ["turbofit.plan("]


def test_a_log_is_explained_as_the_command_explains_it(tmp_path: Path) -> None:
    from turbofit.logs.explain import diagnose  # the room's modules leave the function alone

    text = "$ lmdeploy serve api_server internvl2-8b\n[Errno 98] address already in use\n"
    path = tmp_path / "serve.log"
    path.write_text(text)
    assert turbofit.diagnose(path) == turbofit.diagnose(text) == diagnose([text.encode()])
    assert turbofit.diagnose(text, model="qwen2-vl-7b").read.model == "Qwen2-VL-7B-Instruct"
    with pytest.raises(UsageError, match="cannot be read"):
        turbofit.diagnose(tmp_path / "other.log")


@pytest.mark.parametrize(
    ("log", "word"), [("", "here is none"), (None, "NoneType"), (b"text", "bytes")]
)
def test_what_is_no_log_is_refused(log, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        turbofit.diagnose(log)


def test_the_keywords_of_a_pipeline_are_lmdeploys() -> None:
    here = inspect.signature(turbofit.pipeline).parameters
    there = inspect.signature(open_pipeline).parameters
    assert [*here][: len(there) - 1] == [*there][:-1]
    assert [here[name].default for name in [*there][:-1]] == [
        there[name].default for name in [*there][:-1]
    ]


@pytest.mark.parametrize(
    "door",
    [turbofit.plan, turbofit.predict, turbofit.which, turbofit.rehearse, turbofit.pipeline],
)
def test_help_fits_a_screen(door) -> None:
    assert len(pydoc.plain(pydoc.render_doc(door)).splitlines()) <= 40
    assert door is getattr(turbofit, door.__name__)


def test_help_of_a_request_begins_with_its_keywords_and_their_defaults() -> None:
    """The fields' annotations once filled sixty lines before the first word."""
    text = pydoc.plain(pydoc.render_doc(turbofit.PlanRequest))
    first = text[: text.index("Method resolution order")]
    keywords = len(turbofit.PlanRequest.model_fields)
    of_signature = keywords if sys.version_info >= (3, 13) else 0  # pydoc gives each a line there
    assert len(first.splitlines()) <= 20 + of_signature
    words = " ".join(first.replace("|", " ").split()).replace("( ", "(")
    assert "PlanRequest(*, model, on=None, gpus=None" in words
    assert "Annotated" not in first


@pytest.mark.parametrize(
    ("keywords", "option", "message", "hint"),
    [
        ({"tp": 3}, "tp", "tp=3 is not possible for InternVL2-8B", "choose tp and replicas"),
        ({"tp": 8}, "tp", "tp=8: 8 GPUs are needed, 4 are visible", 'as on="8xrtx3090"'),
        ({"max_pixels": 10**6}, "max_pixels", "max_pixels limits", "or give max_dynamic_patch"),
        ({"quant_policy": 16, "engine": "turbomind"}, "quant_policy", "quant_policy=16", "leave"),
        ({"images": -1}, "images", "images -1: it should be 0 or more", "images: images a"),
        ({"gpus": "4090", "on": None}, "gpus", "names a card", 'on="4090"'),
        ({"gpus": "9"}, "gpus", "gpus: '9' is not one GPU", "GPUs in on, as in 2xrtx3090"),
        ({"imags": 1}, "imags", "has no field imags", "did you mean images?"),
    ],
)  # fmt: skip
def test_an_error_knows_its_option_and_names_the_keyword(keywords, option, message, hint) -> None:
    with pytest.raises(UsageError) as caught:
        turbofit.plan("internvl2-8b", **{"on": "4xrtx3090", **keywords})
    assert caught.value.options[0] == option
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "--" not in caught.value.message


@pytest.mark.parametrize("door", [turbofit.plan, turbofit.pipeline])
def test_a_model_that_is_no_text_is_refused(door) -> None:
    with pytest.raises(UsageError, match="model None"):
        door(None)


def test_an_error_ends_at_the_callers_line_in_pythons_words() -> None:
    with pytest.raises(UsageError) as caught:
        turbofit.plan("internvl2-8b", on="4xrtx3090", tp=3)
    assert "--" not in f"{caught.value.message} {caught.value.hint}"
    frames = traceback.extract_tb(caught.tb)
    assert [Path(frame.filename).name for frame in frames] == ["test_api.py", "api.py"]
    assert caught.value.__suppress_context__
    assert getattr(caught.value, "__notes__", [])[1:] == []


def test_what_is_found_shows_itself() -> None:
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090")
    assert plan.to_dict() == json.loads(plan.to_json())
    assert copy.deepcopy(plan) == plan == pickle.loads(pickle.dumps(plan))
    predicted = turbofit.predict("internvl2-8b", on="1xrtx3090")
    assert repr(predicted).startswith("<Plan: InternVL2-8B on 1xrtx3090, turbomind, tp 1 x 1, ")
    found = Which.from_json(WHICH)
    assert repr(found) == "<Which: 1 of 2 for InternVL2-8B: 1xrtx3090>"
    assert found.to_dict() == json.loads(WHICH)


WHICH = to_json(
    Which(
        turbofit_version="1", created="now", model="InternVL2-8B", machine=None, request={},
        counts=(1,),
        keep=(Serving(model="InternVL2-8B", on="1xrtx3090", gpus=1, bytes=1, keeps=True),),
        others=(Serving(model="InternVL2-8B", on="1xt4", gpus=1, bytes=1, keeps=False),),
    )
)  # fmt: skip
