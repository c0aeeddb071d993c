"""The ONNX graph: traced from the reference, fused, and lowered for the CPU."""
