"""Training of transfer layers: self-distillation text, the frozen teacher, the loop, and held-out acceptance."""
