"""Drafting: sources of candidates, and the best-first tree that is made of what they propose."""
