"""From an exported graph to a plan and its description."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ht_export.tensorrt.build_process import ATTENTIONS, build_plan, check_resources
from ht_export.tensorrt.graph import attention_forms, write_for_tensorrt
from ht_export.tensorrt.kernels import PlanKernels, Report, Wanted
from ht_export.tensorrt.limits import Profile, cache_bytes, check_limits, profiles
from ht_export.tensorrt.products import Capability, Product, find_product, show
from plugins.binaries import ARCHITECTURES, COMMIT_ARCHITECTURES, HEAD_DIMS, PLUGIN_DTYPES, best_architecture
from plugins.tensorrt_plugin import VERSION
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import Attention, FileRecord, Limits, PlanFile
from runtime.errors import InputError
from runtime.files import check_writable
from runtime.tree import TreeSizes

DEFAULT_CONTEXT = 4096
# Requests of a pass: memory for them is taken as they come, but for what the library itself needs at the most.
DEFAULT_BATCH = 8
DEFAULT_ROWS = 32
DEFAULT_CHUNK = 256
# Plans of TensorRT for RTX run on later GPUs than they name; these get kernels too.
LATER = ((9, 0), (10, 0))
# From which on GPUs compute in a precision, where not all do.
LEAST_CAPABILITY: dict[str, Capability] = {"bf16": (8, 0), "fp8": (8, 9)}
FUSED_ATTENTION = "mha"
INSTALL_TRITON = "pip install 'hidden-transfer[plan]'"


@dataclass(frozen=True)
class PlanSettings:
    """Options of a plan. `runtime` None takes the product that is installed, no `capabilities` the product's
    default. `attention` is "plugin", "native" or "auto".
    """

    runtime: str | None = None
    max_batch: int = DEFAULT_BATCH
    max_rows: int | None = None
    capabilities: Sequence[Capability] = ()
    attention: str = "auto"
    timing_cache: Path | None = None


class Planner:
    """One plan for a product and GPUs: `prepare` finds all else that could go wrong before the work begins."""

    def __init__(self, settings: PlanSettings, precision: str = "fp16") -> None:
        self.settings = settings
        if settings.attention not in ATTENTIONS:
            raise InputError(f"--attention must be one of {', '.join(ATTENTIONS)}, not {settings.attention}")
        self.product: Product = find_product(settings.runtime)
        least = LEAST_CAPABILITY.get(precision, (0, 0))
        self.capabilities = self.product.check_capabilities(settings.capabilities, least)
        if not self.product.builds_without_gpu:
            self.capabilities = (_own_capability(),)
        if old := [capability for capability in self.capabilities if capability < least]:
            raise InputError(
                f"--precision {precision}: compute capability {show(old)} does not compute in it, only {show([least])} "
                "and later; use fp16, or build for later ones"
            )
        unknown = [c for c in self.capabilities if best_architecture(*c, COMMIT_ARCHITECTURES) is None]
        if unknown:
            known = show([(sm // 10, sm % 10) for sm in COMMIT_ARCHITECTURES])
            raise InputError(f"there are no kernels for compute capability {show(unknown)}; there are for {known}")
        if settings.timing_cache is not None:
            check_writable(settings.timing_cache)
        if not find_spec("triton"):
            raise InputError(f"a plan carries compiled kernels, and Triton is not installed; {INSTALL_TRITON}")

    def prepare(
        self,
        dims: GraphDims,
        tree: TreeSizes,
        asked: tuple[int | None, int | None],
        model_context: int,
        weight_bytes: int,
        folder: Path,
    ) -> PreparedPlan:
        """Check limits, kernels, memory and disk; return what builds the plan, with the prompt chunk and the context
        that were `asked` for where they are not None. Raises `InputError`.
        """
        settings = self.settings
        chunk, max_context = asked
        context = min(model_context, DEFAULT_CONTEXT) if max_context is None else max_context
        # A choice of the user is taken as it is, or refused.
        max_rows = min(max(DEFAULT_ROWS, tree.tree_rows), context) if settings.max_rows is None else settings.max_rows
        limits = Limits(settings.max_batch, context, max_rows, min(DEFAULT_CHUNK, context) if chunk is None else chunk)
        check_limits(limits, tree, model_context)
        attention = self._attention(dims)
        check_resources(weight_bytes, folder)
        return PreparedPlan(
            self.product,
            self.capabilities,
            settings.timing_cache,
            dims,
            limits,
            attention,
            profiles(dims, limits, tree),
        )

    def _attention(self, dims: GraphDims) -> Attention:
        wanted = self.settings.attention
        reason = None
        if dims.dtype not in PLUGIN_DTYPES:
            reason = f"it computes in {' or '.join(PLUGIN_DTYPES)}, not {dims.dtype}"
        elif dims.head_dim not in HEAD_DIMS:
            reason = f"it takes head sizes from 16 to 256 that 8 divides, not {dims.head_dim}"
        elif unknown := [c for c in self.capabilities if best_architecture(*c, ARCHITECTURES) is None]:
            reason = f"it has no kernel for compute capability {show(unknown)}"
        if reason is None and wanted != "native":
            return "plugin"
        if dims.dtype != "float32" and dims.head_dim % 8:
            raise InputError(
                f"in half precision {self.product.name} takes head sizes that 8 divides, and the model's is "
                f"{dims.head_dim}; use --precision fp32"
            )
        if wanted == "plugin":
            raise InputError(f"--attention plugin: {reason}; use --attention native, or change that")
        return "native"


@dataclass(frozen=True)
class PreparedPlan:
    """A plan that can be built: what for, within which limits, and with which attention ("plugin" or "native")."""

    product: Product
    capabilities: tuple[Capability, ...]
    timing_cache: Path | None
    dims: GraphDims
    limits: Limits
    attention: Attention
    profiles: tuple[Profile, Profile]

    def compile(self, graph: Path, report: Report) -> PlanKernels:
        """Compile the kernels that the plan of this graph carries; `report` is told how many are, and of how many.
        Raises `InputError`.
        """
        targets = self.capabilities
        if self.product.builds_without_gpu:
            targets = tuple(dict.fromkeys((*targets, *LATER)))

        def architectures(known: Sequence[int]) -> list[int]:
            found = (best_architecture(*capability, known) for capability in targets)
            return list(dict.fromkeys(sm for sm in found if sm is not None))

        forms = attention_forms(graph) if self.attention == "plugin" else []
        known = architectures(ARCHITECTURES), architectures(COMMIT_ARCHITECTURES)
        return Wanted.of(self.dims, self.profiles, forms, known).compile(report)

    def build(self, graph: Path, kernels: PlanKernels, plan: Path, tell: Callable[[str], None]) -> PlanFile:
        """Build the plan from the graph and its kernels. Raises `InputError`."""
        dims = self.dims
        uses_plugin = self.attention == "plugin"
        kernels_path = plan.with_name(f"{plan.stem}.kernels.bin")
        kernels_path.write_bytes(kernels.runtime)
        marked = graph.with_name(f"{graph.stem}.tensorrt.onnx")
        count = write_for_tensorrt(graph, marked, dims, plugin=uses_plugin, decomposable=True)
        result = build_plan(
            self.product,
            marked,
            plan,
            self.profiles,
            self.capabilities,
            kernels=kernels.attention,
            plugin_layers=count,
            timing_cache=self.timing_cache,
            on_phase=lambda phase, step, steps: tell(f"{phase} {step}/{steps}" if steps else phase),
        )
        marked.unlink()
        layers = result.engine_layers or []
        kinds = Counter(line.split("LayerType: ", 1)[1].split(",", 1)[0] for line in layers)
        build = {
            "seconds": round(result.seconds, 1),
            "peak_memory": result.peak_memory,
            "peak_private_memory": result.peak_private_memory,
            "network_layers": result.network_layers,
            "engine_layers": dict(kinds),
            "plugin_layers": (result.network_layers or {}).get("PLUGIN_V3", 0),
            "fused_attention_layers": sum(FUSED_ATTENTION in line.split(",", 1)[0] for line in layers)
            // len(self.profiles),
            "cache_bytes_at_limits": cache_bytes(dims, self.limits),
        }
        return PlanFile(
            product=self.product.name,
            version=self.product.version,
            compute_capabilities=self.capabilities,
            attention=self.attention,
            plugin_version=VERSION if uses_plugin else None,
            limits=self.limits,
            profiles={
                profile.name: {name: [list(shape) for shape in ranges] for name, ranges in profile.shapes.items()}
                for profile in self.profiles
            },
            kernels=FileRecord.of(kernels_path),
            build=build,
        )


def _own_capability() -> Capability:
    from runtime.engines.cuda import Cuda

    try:
        return Cuda().capability
    except InputError as error:
        raise InputError(
            f"{error}. TensorRT builds for the GPU in the machine; --runtime tensorrt-rtx needs none"
        ) from error
