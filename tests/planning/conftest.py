"""What all tests of planning share."""

from tests.tuner.conftest import no_other_limits

__all__ = ["no_other_limits"]
