"""The account: what an engine will allocate, term by term; one folder an engine."""
