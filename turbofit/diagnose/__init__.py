"""Why an engine died (`read_log`, `explain`), and what on this machine would make it (`doctor`)."""
