"""How the next token is chosen: what users ask for, the base model's own choice, and the noise of draws."""

from runtime.sampling.options import LogitsProcessor, Sampling, TokenLogProbability

__all__ = ["LogitsProcessor", "Sampling", "TokenLogProbability"]
