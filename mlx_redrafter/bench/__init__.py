"""Everything else that measures."""
