"""`turbofit tune` on simulated engines whose speed is what people published."""
