"""Passes, and what is computed on their way, compared between the PyTorch reference and graphs."""
