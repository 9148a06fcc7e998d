"""Lines of a log become events, events a death; `explain` says its cause and a first step."""
