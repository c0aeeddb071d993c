"""Grammars: what an answer may be, as asked for by the user, and which tokens go on with it."""

from runtime.grammar.given import Grammar

__all__ = ["Grammar"]
