"""Types, errors, units and processes for all of turbofit, of which it imports nothing else."""
