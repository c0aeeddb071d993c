"""What to verify next: draft sources, and the best-first tree that is made of what they propose."""
