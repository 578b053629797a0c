"""The draft tree: its shape, its nodes, and the branch that is kept."""
