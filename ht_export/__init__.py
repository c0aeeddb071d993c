"""Build time: checkpoints, transfer layers and their training, the PyTorch reference, and export to ONNX."""
