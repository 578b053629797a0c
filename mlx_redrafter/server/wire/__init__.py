"""Translators between a dialect and the server's own requests and events: no I/O."""
