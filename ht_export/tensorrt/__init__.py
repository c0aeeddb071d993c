"""TensorRT plans from the exported graph, for TensorRT and TensorRT for RTX."""
