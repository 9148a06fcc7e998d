"""How processes of serving start, end, belong together, and write their lines."""
