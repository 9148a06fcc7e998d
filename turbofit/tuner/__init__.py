"""The search for the best plan: candidates, constraints, throughput and remedies."""
