"""A cluster of machines: where its nodes come from, and how they serve together."""
