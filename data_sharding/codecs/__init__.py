"""How one tap of a teacher becomes bytes and comes back."""
