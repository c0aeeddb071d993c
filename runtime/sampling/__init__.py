"""Choosing the next token: the options of users, the base model's own choice, and the noise of draws."""

from runtime.sampling.options import LogitsProcessor, Sampling, TokenLogProbability

__all__ = ["LogitsProcessor", "Sampling", "TokenLogProbability"]
