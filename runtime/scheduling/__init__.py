"""Many requests at once: which of them run, what they share, and the memory that they take."""
