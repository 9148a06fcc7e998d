"""Parsers for the output of engines; compares forecasts with measured values."""
