"""The types of the contract: what every room speaks, and nothing of its own."""
