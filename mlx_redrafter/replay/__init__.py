"""Replay drafts along answers that are known: what any shape, or any way to choose one, yields."""
