"""TurboMind before 0.18: generations described as data, and one account for all of them."""
