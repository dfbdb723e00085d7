"""What every rank does with its time and memory, and who holds the others up."""
