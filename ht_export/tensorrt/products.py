"""The two products behind one adapter: TensorRT (10.x, 11.x), and TensorRT for RTX.

Both have one API but for a few differences, which live here: how a network is made strongly typed, and what a plan can
be built for. TensorRT builds for the GPU in the machine; TensorRT for RTX for any list of compute capabilities, with no
GPU there at all.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import InputError

Capability = tuple[int, int]


@dataclass(frozen=True)
class Product:
    """An installed product: its name, Python module and version."""

    name: str
    module: Any
    version: str

    @property
    def builds_without_gpu(self) -> bool:
        """True where plans are built for given compute capabilities in place of the machine's own GPU."""
        return hasattr(self.module, "ComputeCapability")

    def network_flags(self) -> int:
        """Return the flags of a strongly typed network: the number of the flag differs between versions."""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def known_capabilities(self) -> tuple[Capability, ...]:
        """Return the compute capabilities that a plan can be built for by name; none for TensorRT."""
        if not self.builds_without_gpu:
            return ()
        names = self.module.ComputeCapability.__members__
        numbers = [int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name)]
        return tuple(sorted((number // 10, number % 10) for number in numbers))

    def check_capabilities(self, wanted: Sequence[Capability], least: Capability = (0, 0)) -> tuple[Capability, ...]:
        """Return the capabilities to build for, by default those of common cards that are at least `least`; () means
        the machine's own GPU.

        Raises `InputError` for one that the product cannot build for.
        """
        if not self.builds_without_gpu:
            if wanted:
                raise InputError(
                    f"--compute-capability: {self.name} builds for the GPU of this machine only; leave it out, or "
                    "build with --runtime tensorrt-rtx"
                )
            return ()
        known = self.known_capabilities()
        unknown = [capability for capability in wanted if capability not in known]
        if unknown:
            raise InputError(
                f"--compute-capability {show(unknown)}: {self.name} {self.version} builds for {show(known)}"
            )
        return tuple(dict.fromkeys(wanted)) or tuple(c for c in DEFAULT_CAPABILITIES if c in known and c >= least)

    def set_capabilities(self, config: Any, capabilities: Sequence[Capability]) -> None:
        """Tell a builder configuration what to build for."""
        if not self.builds_without_gpu:
            return
        config.num_compute_capabilities = len(capabilities)
        for index, (major, minor) in enumerate(capabilities):
            config.set_compute_capability(getattr(self.module.ComputeCapability, f"SM{major}{minor}"), index)


@dataclass(frozen=True)
class _Offer:
    name: str
    module: str
    least: tuple[int, int]
    install: str


# Compute capabilities of the cards that people have: A100, RTX 30, RTX 40, RTX 50.
DEFAULT_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0))
OFFERS = (
    # Before 10.16 the bindings garble a plugin's fields where NumPy is 2 or later.
    _Offer("tensorrt", "tensorrt", (10, 16), "pip install 'hidden-transfer[tensorrt]'"),
    _Offer("tensorrt-rtx", "tensorrt_rtx", (1, 7), "pip install 'hidden-transfer[tensorrt-rtx]'"),
)
NAMES = tuple(offer.name for offer in OFFERS)


def find_product(name: str | None = None) -> Product:
    """Import the product `name`, or the first one that is installed. Raises `InputError` when that cannot be had."""
    offers = [offer for offer in OFFERS if name in (None, offer.name)]
    if not offers:
        raise InputError(f"--runtime {name}: must be one of {', '.join(NAMES)}")
    present = [offer for offer in offers if importlib.util.find_spec(offer.module)]
    if not present:
        raise InputError(
            "a plan needs TensorRT, which is not installed; install one of: "
            + "; ".join(f"{offer.install} ({offer.name})" for offer in offers)
        )
    failures = []
    for offer in present:
        try:
            return _import(offer)
        except InputError as error:
            failures.append(str(error))
    raise InputError("; ".join(failures))


def _import(offer: _Offer) -> Product:
    try:
        module = importlib.import_module(offer.module)
    except Exception as error:
        # Bindings without their libraries, or for another CUDA version.
        raise InputError(f"{offer.name} is installed but cannot be imported ({error}); {offer.install}") from error
    version = str(module.__version__)
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < offer.least:
        least = ".".join(map(str, offer.least))
        raise InputError(f"{offer.name} {version} is too old, at least {least} is needed; {offer.install}")
    return Product(offer.name, module, version)


def parse_capability(text: str) -> Capability:
    """Parse a compute capability such as 8.6. Raises `ValueError`."""
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r} is not a compute capability such as 8.6")
    return int(match[1]), int(match[2])


def show(capabilities: Sequence[Capability]) -> str:
    """Return compute capabilities as users write them."""
    return ", ".join(f"{major}.{minor}" for major, minor in capabilities)
