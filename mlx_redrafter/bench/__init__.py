"""Measured comparisons: speed of every way to decode, a sweep of tree shapes, divergence."""
