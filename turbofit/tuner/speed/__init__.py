"""The forecast of speed that ranks shapes."""
