"""Reading a prompt: in chunks, densely or with sparse attention. Importing it loads no MLX."""
