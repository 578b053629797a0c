"""The budget of a decode step, counted."""
