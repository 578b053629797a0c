"""Between words and token ids; chat and server alike."""
