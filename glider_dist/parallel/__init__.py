"""Processes, placement and exchange."""
