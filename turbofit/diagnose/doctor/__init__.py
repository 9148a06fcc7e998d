"""What on this machine would stop an engine: checks with a state, a reason and a fix each."""
