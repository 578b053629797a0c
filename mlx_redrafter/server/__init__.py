"""An HTTP server in the dialects of OpenAI and Anthropic; one engine thread computes."""
