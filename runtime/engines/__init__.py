"""Engines: what runs the exported graph."""
