"""Whatever dies, a run ends in the same weights: what is kept, what is noticed, and what is said of it."""
