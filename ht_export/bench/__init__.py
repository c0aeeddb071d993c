"""Benchmarks of engines: how fast they are against plain decoding and other software, and whether the text is right."""
