"""Which engine gets a request, and how it gets there."""
