"""One file a family: image -> units -> tokens, tower dimensions."""
