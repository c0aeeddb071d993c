"""Whether an engine computes what its base model does: stage by stage, layer by layer, and in the text."""
