"""What is said of a name of which no model is made."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


def refused(name: str, **keywords: str) -> UsageError:
    """Return the error, which has one line and does not blame the network."""
    with pytest.raises(UsageError) as caught:
        resolve_model(name, **keywords)
    assert "cannot be reached" not in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value
