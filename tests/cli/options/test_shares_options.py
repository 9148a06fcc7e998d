from __future__ import annotations

import pytest

from turbofit.cli.options.common_options import filled
from turbofit.cli.options.launch_options import SharesOptions
from turbofit.core.errors import UsageError


def test_shares_belong_to_models() -> None:
    shares = filled(SharesOptions, {"share": "a=2, b/c=0.5"})
    assert shares.of_models(("a", "b/c", "d")) == (2.0, 0.5, 1.0)
    with pytest.raises(UsageError, match="names a, which is not"):
        shares.of_models(("b/c", "d"))
    with pytest.raises(UsageError, match="there is one"):
        filled(SharesOptions, {"share": "a=2"}).of_models(("a",))
    with pytest.raises(UsageError, match="named twice"):
        SharesOptions().of_models(("a", "a"))
    for wrong in ("a", "a=0", "a=x", "a=1,a=2", "=1"):
        with pytest.raises(UsageError, match="is no share"):
            filled(SharesOptions, {"share": wrong})
