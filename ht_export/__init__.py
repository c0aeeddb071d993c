"""Build time: checkpoints, the PyTorch reference, export to ONNX and TensorRT, training, benchmarks and parity."""
