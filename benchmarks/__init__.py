"""Speed, memory and correctness against the alternatives; each script says how to run it."""
