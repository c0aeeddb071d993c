"""The peers that are known, how each is installed, and which form of the model it runs in each precision."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32, BITS16, BITS8, BITS4 = PRECISIONS = ("float32", "16bit", "8bit", "4bit")
# Forms of a model: our engine; a GGUF file; a folder of Hugging Face's, in float32; what the peer makes of that.
ENGINE, GGUF, CHECKPOINT, MADE, ADDRESS = "engine", "GGUF", "checkpoint", "its own", "address"


@dataclass(frozen=True)
class PeerKind:
    """A peer: its `name` on the command line, its `title` in tables, the module that is its `worker`, the line that
    installs it, and the form of the model by precision.

    `converter` is what makes `MADE` forms, where that is installed apart.
    """

    name: str
    title: str
    worker: str
    install: str
    forms: dict[str, str]
    converter: str = ""


OURS = PeerKind(
    "ours",
    "hidden-transfer",
    "hidden_transfer",
    "pip install 'hidden-transfer[cpu]'",
    {FLOAT32: ENGINE, BITS8: ENGINE, BITS4: ENGINE},
)
TRANSFORMERS = PeerKind(
    "transformers",
    "transformers",
    "transformers_generate",
    "pip install 'hidden-transfer[bench]'",
    {FLOAT32: CHECKPOINT, BITS16: CHECKPOINT},
)
KINDS = {
    kind.name: kind
    for kind in (
        OURS,
        PeerKind(
            "llama_cpp",
            "llama.cpp",
            "llama_cpp_python",
            "pip install 'hidden-transfer[peer-llama-cpp]'",
            dict.fromkeys(PRECISIONS, GGUF),
        ),
        PeerKind(
            "openvino",
            "OpenVINO GenAI",
            "openvino_genai",
            "pip install 'hidden-transfer[peer-openvino]'",
            # It reads no GGUF files in float32.
            {FLOAT32: MADE, BITS16: GGUF, BITS8: GGUF, BITS4: GGUF},
            "pip install 'optimum-intel>=2.2,<3' nncf",
        ),
        PeerKind(
            "onnxruntime_genai",
            "ONNX Runtime GenAI",
            "onnxruntime_genai",
            "pip install 'hidden-transfer[peer-onnxruntime-genai]'",
            # Its builder makes no files for CPUs in 16 bits.
            {FLOAT32: MADE, BITS8: MADE, BITS4: MADE},
            "pip install 'hidden-transfer[export]'",
        ),
        TRANSFORMERS,
    )
}
# Of our own exports.
EXPORTS = {FLOAT32: "fp32", BITS8: "int8", BITS4: "int4"}
# What an engine says of itself.
ENGINE_PRECISIONS = {"float32": FLOAT32, "float16": BITS16, "bfloat16": BITS16, "int8": BITS8, "int4": BITS4}


def server(name: str) -> PeerKind:
    """Return the kind of a server that is measured by its address."""
    return PeerKind(name, name, "openai_server", "pip install 'hidden-transfer[bench]'", {"its own": ADDRESS})
