"""The kernels that an engine's library contains for each card, read from the library itself."""
