"""The base model and its transfer layers in PyTorch: checkpoints, families, and the reference of a pass."""
