"""The decode step: draft, choose a tree, verify, accept, commit."""
