"""Measurements behind ``glider-dist bench``."""
