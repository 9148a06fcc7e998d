"""Rules for each kind of log, and the arithmetic of missing memory."""
