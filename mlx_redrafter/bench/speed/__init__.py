"""Decoding against the clock, in turns."""
