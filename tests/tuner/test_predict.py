from __future__ import annotations

import turbofit


def test_a_prediction_says_what_that_version_is_known_to_die_of():
    settings = {"on": "2xa100", "tp": 2, "communicator": "cuda-ipc"}
    old = turbofit.predict("internvl2-8b", lmdeploy="0.15.0", **settings)
    assert any("github.com/InternLM/lmdeploy/pull/4873" in text for text in old.warnings)
    mended = turbofit.predict("internvl2-8b", lmdeploy="0.16.0", **settings)
    assert not any("lmdeploy/pull/" in text for text in mended.warnings)
