"""The plain student and a list of methods at one budget: plan, runs, store and table."""
