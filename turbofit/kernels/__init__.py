"""Which kernels an engine holds for which card, read from the engine's library itself."""
