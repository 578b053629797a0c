"""What a decode step costs, counted from its graph: no Mac is needed, and two runs agree."""
