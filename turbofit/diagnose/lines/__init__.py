"""Lines of logs, as types: engines, torch, the host."""
