"""`plan --lmdeploy VERSION`: settings for the LMDeploy that people have, by its account."""

from __future__ import annotations

import pytest

import turbofit
from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.messages import OWN_CODE
from turbofit.core.plan import Plan
from turbofit.report.painters.terminal import paint
from turbofit.report.views.plan_view import plan_view


@pytest.mark.parametrize("version", ["0.5.3", "0.6.4", "0.9.2", "0.12.0", "0.16.0"])
def test_predict_of_its_settings_agrees_without_its_patch_limit(version: str) -> None:
    plan = turbofit.plan("internvl2-8b", on="4xrtx3090", tp=4, lmdeploy=version)
    assert (plan.fits, plan.backend.version) == (True, version)
    chosen = plan.engines[0].settings
    told = turbofit.predict(
        "internvl2-8b", on="4xrtx3090", lmdeploy=version, engine=plan.backend.name, tp=4,
        cache_max_entry_count=chosen.cache_max_entry_count,
        max_prefill_token_num=chosen.max_prefill_token_num,
        max_batch_size=chosen.max_batch_size, session_len=chosen.session_len,
    )  # fmt: skip
    assert told.fits
    # A version that `serve` does not start has no gateway: the plan pays for LMDeploy's exposure.
    assert (plan.serve is not None) == (version == "0.16.0")
    exposed = plan.model.image_rule.exposed_limit
    assert (plan.promise.limits.max_dynamic_patch == exposed) == (version != "0.16.0")
    assert "public figures alone" in plan.warnings[0]
    assert plan.engines[0].command.argv[:3] == ("lmdeploy", "serve", "api_server")


def test_the_margin_is_twice_the_usual_one_unless_it_is_given() -> None:
    usual = turbofit.plan("internvl2-8b", on="4xrtx3090", tp=4)
    older = turbofit.plan("internvl2-8b", on="4xrtx3090", tp=4, lmdeploy="0.9.2")
    given = turbofit.plan("internvl2-8b", on="4xrtx3090", tp=4, lmdeploy="0.9.2", margin="1GiB")
    assert older.ledgers[0].margin == 2 * usual.ledgers[0].margin
    assert given.ledgers[0].margin == 1 << 30


def test_where_the_exposure_does_not_fit_a_gateway_holds_the_limit() -> None:
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090", lmdeploy="0.9.2", max_dynamic_patch=2)
    assert plan.promise.limits.max_dynamic_patch == 2
    assert any("`turbofit gateway --plan FILE --upstream URL`" in one for one in plan.warnings)


def test_a_version_without_an_account_is_refused() -> None:
    with pytest.raises(TurbofitError, match=r"0\.1\.0"):
        turbofit.plan("internvl2-8b", on="1xrtx3090", lmdeploy="0.1.0")


@pytest.mark.parametrize("version", ["0.20", "1.0.0"])
def test_a_version_that_no_account_knows_is_refused(version: str) -> None:
    with pytest.raises(UsageError, match=f"LMDeploy {version} is newer than 0.18") as caught:
        turbofit.plan("internvl2-2b", on="1xrtx3090", lmdeploy=version)
    assert f"turbofit predict MODEL --lmdeploy {version}" in caught.value.hint


@pytest.mark.parametrize("word", ["latest", "main"])
def test_a_word_is_no_version(word: str) -> None:
    for told in (turbofit.plan, turbofit.predict):
        with pytest.raises(UsageError, match=f"'{word}' is no release of LMDeploy"):
            told("internvl2-2b", on="1xrtx3090", lmdeploy=word)
    with pytest.raises(UsageError, match="no release"):
        turbofit.diagnose("CUDA out of memory. Tried to allocate 1 GiB", lmdeploy=word)


def test_the_reference_is_planned_as_without_a_version() -> None:
    usual = turbofit.plan("internvl2-2b", on="2xrtx4090")
    named = turbofit.plan("internvl2-2b", on="2xrtx4090", lmdeploy="0.18.0")
    assert named.engines == usual.engines
    assert not any("public figures alone" in text for text in named.warnings)


def test_a_version_that_does_not_run_a_model_names_the_first_that_does() -> None:
    with pytest.raises(UsageError) as caught:
        turbofit.plan("qwen2.5-vl-7b", on="1xrtx4090", lmdeploy="0.5")
    assert caught.value.hint == 'lmdeploy="0.7.2" or newer'
    assert turbofit.plan("qwen2.5-vl-7b", on="1xrtx4090", lmdeploy="0.7.2").fits


def shown(version: str, on: str = "2xrtx4090") -> str:
    """The short answer of a plan for a version."""
    return paint(plan_view(turbofit.plan("internvl2-2b", on=on, lmdeploy=version)), short=True)


@pytest.mark.parametrize("version", ["0.5.3", "0.6.2", "0.9", "0.16", "0.17"])
def test_the_short_answer_ends_with_the_versions_own_line_once(version: str) -> None:
    text = shown(version)
    assert text.count("lmdeploy serve api_server") == 1
    own = text[text.index("LMDeploy alone holds no limits") :].splitlines()
    assert "CUDA_VISIBLE_DEVICES=0 " in own[1]
    assert own[-2] == "the same command on GPU 1, with --server-port 23334"
    assert ("turbofit serve internvl2-2b" in text) == (version in ("0.16", "0.17"))


def test_cards_that_are_not_equal_have_a_line_each() -> None:
    text = shown("0.9.2", on="rtx3090+rtx4090")
    assert text.count("lmdeploy serve api_server") == 2
    assert "the same on" not in text


def test_settings_are_those_that_the_line_can_set() -> None:
    """0.5.3 had no --max-prefill-token-num, and no release has --max-dynamic-patch."""
    text = shown("0.5.3")
    facts = text[text.index("settings") : text.index("KV cache")]
    assert "max_batch_size" in facts
    assert "max_prefill_token_num" not in facts
    assert "max_dynamic_patch" not in facts
    assert "max_dynamic_patch 12" in shown("0.17")


def test_an_option_that_a_version_lacks_is_not_said_to_be_set() -> None:
    for version, said in (("0.5.3", False), ("0.17", True)):
        plan = turbofit.plan("internvl2-2b", on="1xrtx4090", lmdeploy=version)
        assert (OWN_CODE in plan.warnings) is said
        assert ("--trust-remote-code" in plan.engines[0].command.argv) is said


@pytest.mark.parametrize("version", ["0.6.4", "0.9.2", "0.17.0"])
def test_the_document_of_an_older_release_can_be_read(version: str) -> None:
    """Its ``usual_image`` was null, and neither a report nor an export read it."""
    plan = turbofit.plan("internvl2-2b", on="1xt4", lmdeploy=version)
    assert Plan.from_json(plan.to_json()) == plan
