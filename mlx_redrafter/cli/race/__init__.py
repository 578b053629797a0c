"""Plain and drafted decoding side by side."""
