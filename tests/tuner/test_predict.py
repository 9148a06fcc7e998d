from __future__ import annotations

import turbofit


def test_a_prediction_says_what_that_version_is_known_to_die_of():
    settings = {"on": "2xa100", "tp": 2, "communicator": "cuda-ipc"}
    old = turbofit.predict("internvl2-8b", lmdeploy="0.15.0", **settings)
    assert not old.fits
    assert "does not run: TurboMind before LMDeploy 0.16 ends with" in old.verdict
    assert "github.com/InternLM/lmdeploy/pull/4873" in old.verdict
    assert "take --communicator nccl" in old.verdict
    assert not any("lmdeploy/pull/" in text for text in old.warnings)  # said once
    mended = turbofit.predict("internvl2-8b", lmdeploy="0.16.0", **settings)
    assert mended.fits
    assert not any("lmdeploy/pull/" in text for text in (mended.verdict, *mended.warnings))


def test_what_one_replica_is_known_to_die_of_ends_a_prediction():
    settings = {"engine": "pytorch", "lmdeploy": "0.8.0", "replicas": 2}
    for machine in ("a100+rtx3090", "rtx3090+a100"):
        told = turbofit.predict("internvl3-8b", on=machine, **settings)
        assert not told.fits
        assert "out of resource: shared memory" in told.verdict
    assert turbofit.predict("internvl3-8b", on="2xa100", **settings).fits


def test_wrong_answers_stay_a_warning():
    settings = {"quant_policy": 4, "cache_max_entry_count": 0.5}
    told = turbofit.predict("qwen2.5-vl-7b", on="1xa100", **settings)
    assert told.fits
    assert any("github.com/InternLM/lmdeploy" in text for text in told.warnings)
