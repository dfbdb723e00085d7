"""Teacher caches are filled: what a cache is made of, who fills it, and what it would cost."""
