"""`mlx-redrafter prefill-bench`: sparse beside dense reading of a prompt: time, density, recall."""
