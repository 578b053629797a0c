"""How much to draft and to read in one pass on this machine: measured once, chosen step by step."""
