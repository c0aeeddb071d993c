"""Operator sets of the graphs: ONNX's own, that of tree attention, and that of ONNX Runtime's contributed operators."""

from __future__ import annotations

# Version of ONNX's standard operators that graphs are written in.
OPSET = 23
# Domain of `TreeAttention`, a local function of the graph and the name of the TensorRT plugin.
DOMAIN = "ht.llm"
DOMAIN_VERSION = 1
# ONNX Runtime's domain of operators that ONNX lacks.
CONTRIB = "com.microsoft"
