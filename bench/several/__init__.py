"""Several models behind one address: in turns, asleep and together, under faults."""
