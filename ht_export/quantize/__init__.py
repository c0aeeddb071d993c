"""Precisions, and weights rounded to fewer bits."""
