"""Forecast of what a configuration takes: parameters, memory, placement."""
