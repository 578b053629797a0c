"""How good a drafter is: live, and position by position."""
