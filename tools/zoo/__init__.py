"""Architectures of the field, small and with random weights, taken along the whole road: `python -m tools.zoo`."""
