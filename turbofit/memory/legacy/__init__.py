"""TurboMind before 0.18: generations as data, and one account that reads them."""
