"""Turns a configuration into measurements: load, calibrate, bank, candidate, quality, runner."""
