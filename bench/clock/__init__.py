"""The clock of pretend GPUs beside its table, and beside figures that were measured."""
