"""Stacked expert weights and the grouped products over them."""
