"""The part of TensorRT's Python API that we use, as data, and a double of the module made of that.

    python -m tests.ht_export.tensorrt.tensorrt_api MODULE FILE.json

writes what a module has: the bindings' own documentation states the signature of every overload.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType, WrapperDescriptorType
from typing import Any

import numpy as np

CLASSES = re.findall(
    r"\w+",
    """
    Builder BuilderFlag ComputeCapability DataType DimsExprs DynamicPluginTensorDesc
    DynamicShapesKernelSpecializationStrategy EngineInvalidityDiagnostics EngineValidity
    ExecutionContextAllocationStrategy IBuilderConfig ICudaEngine IDimensionExpr IExecutionContext IExprBuilder
    IHostMemory ILayer ILogger INetworkDefinition IOptimizationProfile IPluginCapability IPluginCreator
    IPluginCreatorInterface IPluginCreatorV3One IPluginCreatorV3Quick IPluginRegistry IPluginV3 IPluginV3OneBuild
    IPluginV3OneCore IPluginV3OneRuntime IProgressMonitor IRuntimeCache IRuntimeConfig IStreamWriter ITimingCache
    IVersionedInterface LayerType NetworkDefinitionCreationFlag OnnxParser ParserError PluginCapabilityType
    PluginField PluginFieldCollection PluginFieldType PluginTensorDesc ProfilingVerbosity Runtime TensorFormat
    TensorRTPhase
    """,
)
FUNCTIONS = ("get_plugin_registry",)
SPECIAL = ("__init__", "__len__", "__getitem__", "__iter__")
_ENUM_DEFAULT = re.compile(r"<(\w+\.\w+): -?\d+>")
_PREFIX = re.compile(r"('[^']*')|(?:\w+(?:\.|::))+(?=[A-Za-z_])")


def describe(module: ModuleType) -> dict[str, Any]:
    """Return what `module` has of the API that we use. A signature is Python, without `self` and module names."""
    types = {name: getattr(module, name) for name in CLASSES if hasattr(module, name)}
    types |= {
        f"{name}.{key}": value
        for name, kind in types.items()
        for key, value in vars(kind).items()
        if isinstance(value, type) and not key.startswith("_")
    }
    enums = {name: kind for name, kind in types.items() if hasattr(kind, "__members__")}
    return {
        "version": str(module.__version__),
        "functions": {name: _overloads(getattr(module, name)) for name in FUNCTIONS},
        "values": dict(sorted(_values(vars(module), {"DataType": enums["DataType"]}).items())),
        "enums": {
            name: {"ordered": "__lt__" in vars(kind), "members": {m: int(v) for m, v in kind.__members__.items()}}
            for name, kind in enums.items()
        },
        "classes": {name: _class(kind, enums) for name, kind in types.items() if name not in enums},
    }


def _values(content: Mapping[str, Any], enums: Mapping[str, type]) -> dict[str, str]:
    names = {kind: name for name, kind in enums.items()}
    return {key: f"{names[type(value)]}.{value.name}" for key, value in content.items() if type(value) in names}


def _class(kind: type, enums: Mapping[str, type]) -> dict[str, Any]:
    content = {name: value for name, value in vars(kind).items() if not name.startswith("_") or name in SPECIAL}
    values = _values(content, enums)
    methods, properties = {}, {}
    for name, value in content.items():
        if isinstance(value, property):
            # Where a value can be of several types its getter has no documentation.
            signature = _signature(value.fget.__doc__ or "() -> object")
            properties[name] = {"kind": signature.split(" -> ")[1], "settable": value.fset is not None}
        # Types without a constructor of their own are made by the library only.
        elif name not in values and not isinstance(value, type | WrapperDescriptorType):
            methods[name] = _overloads(value)
    bases = [base.__name__ for base in kind.__bases__ if base.__name__ in CLASSES]
    return {"bases": bases, "methods": methods, "properties": properties, "values": values}


def _overloads(function: Any) -> list[str]:
    """Return the signatures that the documentation of a bound function states."""
    name, text = function.__name__, function.__doc__
    lines = re.findall(rf"^(?:\d+\. )?{name}(\(.*\) -> .*)$", text, re.MULTILINE)
    assert lines, f"{name} is not documented: {text!r}"
    return [_signature(line) for line in lines]


def _signature(line: str) -> str:
    line = line.strip().splitlines()[0]
    line = re.sub(r"^\((?:self|arg0): [\w.:]+(?:, )?", "(", line)
    line = _ENUM_DEFAULT.sub(r"'\1'", line)
    line = _PREFIX.sub(lambda match: match[1] or "", line)
    # Neither is Python: an argument's name, and the type of a registry.
    return line.replace("(in: ", "(in_: ").replace("accessor<str_attr>", "IPluginRegistry")


class Double(ModuleType):
    """A module that has what `api`, of `describe`, says, and nothing else.

    Every call is bound to the signatures; `calls` lists them as ("Class.method", arguments). What comes back is what
    `answers["Class.method"]` or `answers["Class.property"]` returns, which is given the object and the arguments, or
    else a new object of the type that the signature names. `derived` lists the classes made from those of the module.
    """

    def __init__(self, name: str, api: Mapping[str, Any], answers: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(name)
        self.api = api
        self.answers = answers
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.derived: list[type] = []
        self.kinds: dict[str, Any] = {}
        self.__version__ = api["version"]
        for kind, about in api["enums"].items():
            make: Any = _Ordered if about["ordered"] else _Plain
            self.kinds[kind] = make(kind, about["members"])
        for kind in api["classes"]:
            self._make(kind)
        for kind, value in self.kinds.items():
            if "." not in kind:
                setattr(self, kind, value)
        for key, value in api["values"].items():
            setattr(self, key, self._value(value))
        for function, overloads in api["functions"].items():
            setattr(self, function, _caller(self, function, overloads).__get__(self))

    def new(self, kind: str, **values: Any) -> Any:
        """Return an object as the library makes it, whatever its constructor says."""
        made = self.kinds[kind].__new__(self.kinds[kind])
        vars(made).update(values)
        return made

    def called(self, name: str) -> list[dict[str, Any]]:
        """Return the arguments of every call of `name`."""
        return [arguments for call, arguments in self.calls if call == name]

    def answer(self, name: str, kind: str, *arguments: Any) -> Any:
        """Return what a call answers."""
        if name in self.answers:
            return self.answers[name](*arguments)
        if kind in self.kinds:
            return self.new(kind) if kind in self.api["classes"] else next(iter(self.kinds[kind]))
        return {"bool": True, "int": 0, "str": ""}.get(kind)

    def fits(self, value: Any, kind: str) -> bool:
        """Return whether the bindings convert `value` to an argument of type `kind`."""
        # A collection of fields is bound as a list, and converted to TensorRT's own.
        expected = self.kinds.get(kind.removesuffix("_")) or self.kinds.get(f"ILogger.{kind}")
        if expected is not None:
            return isinstance(value, expected)
        if kind == "Dims":
            return isinstance(value, tuple | list) and all(isinstance(size, int) for size in value)
        types: dict[str, Any] = {"bool": bool, "tuple": tuple, "list": list, "str": str, "FallbackString": str}
        types |= {"int": int | np.integer, "SupportsInt": int | np.integer}
        types |= dict.fromkeys(("buffer", "Buffer"), bytes | bytearray | memoryview | np.ndarray)
        return isinstance(value, types.get(kind, object))

    def _value(self, path: str) -> Any:
        kind, member = path.rsplit(".", 1)
        return self.kinds[kind][member]

    def _make(self, name: str) -> type:
        if name not in self.kinds:
            about = self.api["classes"][name]
            content: dict[str, Any] = {"__init__": _no_constructor, "double": self}
            content |= {key: _caller(self, f"{name}.{key}", value) for key, value in about["methods"].items()}
            content |= {key: _property(self, f"{name}.{key}", **value) for key, value in about["properties"].items()}
            content |= {key: self._value(value) for key, value in about["values"].items()}
            nested = (kind for kind in self.kinds if kind.startswith(f"{name}."))
            content |= {kind.split(".")[1]: self.kinds[kind] for kind in nested}
            bases = tuple(self._make(base) for base in about["bases"]) or (_Bound,)
            self.kinds[name] = type(name, bases, content)
        return self.kinds[name]


class _Bound:
    """Objects of the library have the attributes of their class; those of Python classes that derive from it any."""

    double: Double

    def __init_subclass__(cls) -> None:
        if "double" not in vars(cls):
            cls.double.derived.append(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if "double" in vars(type(self)) and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        super().__setattr__(name, value)


def _no_constructor(self: Any, *arguments: Any) -> None:
    raise TypeError(f"{type(self).__name__}: No constructor defined!")


def _property(module: Double, name: str, kind: str, settable: bool) -> property:
    key = name.split(".")[1]

    def get(self: Any) -> Any:
        return vars(self)[key] if key in vars(self) else module.answer(name, kind, self)

    def put(self: Any, value: Any) -> None:
        if not module.fits(value, kind):
            raise TypeError(f"{name} is of type {kind}, not {value!r}")
        module.calls.append((name, {"value": value}))
        vars(self)[key] = value

    return property(get, put if settable else None)


def _caller(module: Double, name: str, overloads: list[str]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        for about in map(signature, overloads):
            try:
                bound = about.bind(*arguments, **named).arguments
            except TypeError:
                continue
            if all(module.fits(value, about.parameters[key].annotation) for key, value in bound.items()):
                module.calls.append((name, bound))
                if name.endswith(".__init__"):
                    vars(self).update(bound)
                return module.answer(name, about.return_annotation, self, *bound.values())
        raise TypeError(f"{name}(*{arguments}, **{named}): incompatible arguments, it takes {' or '.join(overloads)}")

    return call


@cache
def signature(text: str) -> inspect.Signature:
    """Return the signature that `text` is, with its types as text."""
    scope: dict[str, Any] = {}
    exec(f"from __future__ import annotations\ndef function{text}: ...", scope)
    return inspect.signature(scope["function"])


class _Plain(enum.Enum):
    def __int__(self) -> int:
        return self.value

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class _Ordered(enum.IntEnum):
    __str__ = _Plain.__str__


def main(module: str, path: str) -> None:
    """Write what `module` has to `path`."""
    text = json.dumps(describe(importlib.import_module(module)), indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
