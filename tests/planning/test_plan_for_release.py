"""`plan --lmdeploy VERSION`: settings for the LMDeploy that people have, by its account."""

from __future__ import annotations

import pytest

import turbofit
from turbofit.core.errors import TurbofitError


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
