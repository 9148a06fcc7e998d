"""Several models behind one address, each of which may sleep: `models_gateway` is the way in."""
