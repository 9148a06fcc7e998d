"""How far the forecast of speed is from figures that people published."""
