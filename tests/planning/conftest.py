"""What all tests of planning share."""

from tests.support.plans import no_other_limits

__all__ = ["no_other_limits"]
