"""Forecasts beside rehearsals on pretend GPUs."""
