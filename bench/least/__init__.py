"""Whether a plan of `--least` keeps what was promised, and takes no more."""
