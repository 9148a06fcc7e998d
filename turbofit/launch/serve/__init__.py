"""``turbofit serve``: one run from its plan to its end, and what surrounds it."""
