"""Data that several machines have made, each a part, put together in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ht_export.training.data import MANIFEST, MANIFESTS, Manifest, read_answers
from ht_export.training.identity import first_difference
from runtime.errors import InputError
from runtime.files import atomic_path, write_json


def merge(parts: Sequence[Path], out: Path) -> int:
    """Copy the shards of `parts`, all the parts of one whole, to the new folder `out`; return the number of answers.

    The manifest comes last: until then `out` is no data folder. Raises `InputError` where a part is unfinished, cut
    short or missing, comes twice, or was made otherwise than the first.
    """
    if (out / MANIFEST).exists():
        raise InputError(f"{out} is a data folder already; choose a new one")
    manifests = [_read(part) for part in parts]
    _check_same(parts, manifests)
    _check_complete(parts, manifests)
    out.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for part, manifest in zip(parts, manifests, strict=True):
        for name in manifest.shards or ():
            turn = name.split("-")[1]
            new = f"shard-{turn}-{len(names):05d}.jsonl"
            with atomic_path(out / new) as temporary:
                shutil.copyfile(part / name, temporary)
            names.append(new)
    first = manifests[0]
    sequences = sum(manifest.sequences or 0 for manifest in manifests)
    whole = replace(first, shards=sorted(names), sequences=sequences, settings=_of_all(first))
    write_json(out / MANIFEST, asdict(whole))
    return sequences


def _read(part: Path) -> Manifest:
    path = part / MANIFEST
    if not path.is_file():
        raise InputError(f"{part} is not a data folder (no {MANIFEST}); make one with: ht-train data")
    manifest = MANIFESTS.read(path)
    missing = [name for name in manifest.shards or () if not (part / name).is_file()]
    if manifest.shards is None or missing:
        raise InputError(f"{part} is not finished; run ht-train data again with the same settings")
    read_answers(part, manifest)
    return manifest


def _of_all(manifest: Manifest) -> dict[str, Any]:
    return {**manifest.settings, "part": "1/1"}


def _check_same(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    def compared(manifest: Manifest) -> dict[str, Any]:
        return asdict(replace(manifest, shards=None, sequences=None, settings=_of_all(manifest)))

    for part, manifest in zip(parts, manifests, strict=True):
        if difference := first_difference(compared(manifests[0]), compared(manifest)):
            raise InputError(f"{part} was made with another {difference} than {parts[0]}; make it again")


def _check_complete(parts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    found: dict[str, Path] = {}
    for part, manifest in zip(parts, manifests, strict=True):
        told = str(manifest.settings.get("part"))
        if told in found:
            raise InputError(f"{found[told]} and {part} are both part {told}; give each part once")
        found[told] = part
    of = next(iter(found)).partition("/")[2]
    wanted = [f"{number}/{of}" for number in range(1, len(found) + 1)]
    odd = next((told for told in found if told not in wanted), None)
    if odd is not None or str(len(found)) != of:
        raise InputError(
            f"these are the parts {', '.join(found)}, and not all of one whole; give the folders of all parts"
        )
