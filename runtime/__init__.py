"""Run time: draft-and-verify decoding on an exported engine."""
