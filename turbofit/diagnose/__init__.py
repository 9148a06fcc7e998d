"""Why an engine died (`read_log`, `explain`)."""
