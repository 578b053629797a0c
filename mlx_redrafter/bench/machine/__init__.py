"""What this machine does with a model, as a report that can be pasted into an issue."""
