"""Where the code reads what is in files, and where it describes them: by its syntax, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Methods, of whatever object.
METHODS = frozenset(
    {
        *("read_text", "read_bytes", "open", "from_file", "from_pretrained", "from_buffer", "from_str", "frombuffer"),
        *("parse_from_file", "deserialize_cuda_engine", "memmap", "fromfile", "loadtxt", "genfromtxt", "GGUFReader"),
        *("FromString", "ParseFromString"),
    }
)
# What is called a format and describes no file: how calls of tools are written, and what text an answer is.
OTHERS = ("ToolFormat", "TextFormat")
# Functions by their names, as they are called.
FUNCTIONS = frozenset(
    {
        *("open", "safe_open", "load_file", "os.open", "os.fdopen", "mmap.mmap", "json.load", "json.loads", "np.load"),
        *("torch.load", "onnx.load", "onnx.load_model", "onnx.load_external_data_for_model", "ir.load", "pickle.load"),
        *("pickle.loads", "msgspec.json.decode", "msgspec.convert", "ast.literal_eval", "eval", "exec", "cached_file"),
    }
)


@dataclass(frozen=True, order=True)
class Reading:
    """A call that reads: in which file, in which function ("" outside of any), and what is called."""

    file: str
    function: str
    called: str


def readings_of(root: Path, folders: tuple[str, ...]) -> Iterator[Reading]:
    """Yield the calls in all Python files of these folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            for function, called in readings_in(path.read_text(encoding="utf-8")):
                yield Reading(str(path.relative_to(root)), function, called)


def readings_in(source: str) -> Iterator[tuple[str, str]]:
    """Yield the calls that read in `source`, with the function that each is in."""
    yield from _walk(ast.parse(source), "")


def _walk(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        within = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            within = f"{function}.{child.name}".lstrip(".")
        if isinstance(child, ast.Call) and (called := _reads(child)):
            yield function, called
        yield from _walk(child, within)


def _reads(call: ast.Call) -> str | None:
    """Return what `call` calls where that reads, None elsewhere."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if name not in FUNCTIONS and not (isinstance(call.func, ast.Attribute) and last in METHODS):
        return None
    if last == "open" and name != "os.open" and _only_writes(call, 1 if name == "open" else 0):
        return None
    return name if name in FUNCTIONS else last


def _only_writes(call: ast.Call, place: int) -> bool:
    modes = [*call.args[place : place + 1], *(word.value for word in call.keywords if word.arg == "mode")]
    mode = next((mode.value for mode in modes if isinstance(mode, ast.Constant)), "r")
    return isinstance(mode, str) and not {"r", "+"} & set(mode)


def formats_made_in(source: str) -> Iterator[str | None]:
    """Yield the names that formats have in a module of this source, and None for each that has none there."""
    tree = ast.parse(source)
    named = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            named[node.value] = node.targets[0].id
    for found in ast.walk(tree):
        if isinstance(found, ast.Call):
            called = found.func.value if isinstance(found.func, ast.Subscript) else found.func
            if ast.unparse(called).endswith("Format") and not ast.unparse(called).endswith(OTHERS):
                yield named.get(found)
