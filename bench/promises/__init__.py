"""Whether a promise ever shrinks because there is more."""
