"""What a sequence leaves behind: the caches of layers, and sessions made of them."""
