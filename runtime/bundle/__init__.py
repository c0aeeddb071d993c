"""The files of an engine: what they are called, what is in them, and whether they are whole."""
