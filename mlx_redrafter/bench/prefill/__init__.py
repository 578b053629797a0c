"""Sparse reading of long prompts: time, density, recall."""
