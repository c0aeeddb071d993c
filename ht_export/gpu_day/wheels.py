"""Installed packages as archives that can be carried, and unpacked where there is no network and perhaps no pip."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

from runtime.errors import InputError
from runtime.files import atomic_path

# Those of glibc 2.5 to 2.35, by the names that wheels have.
PLATFORMS = (
    "manylinux1_x86_64",
    "manylinux2014_x86_64",
    *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35)),
)
# Folders of a wheel whose contents belong beside the rest.
LIBRARIES = ("purelib", "platlib")


def archive_of(package: str, folder: Path, python: str, say: Callable[[str], None]) -> Path:
    """Return an archive of `package`, in the version that is installed here, for the Python version `python` ("3.12")
    on Linux: of the files that are installed, where those are for any Python, else a wheel that pip fetches.

    Raises `InputError` where the package is not installed, or there is no such wheel.
    """
    try:
        installed = distribution(package)
    except PackageNotFoundError as error:
        raise InputError(f"{package} is not installed here, so that there is no version of it to carry") from error
    name = package.replace("-", "_")
    for found in sorted(folder.glob(f"{name}-{installed.version}-*.whl")):
        return found
    if _is_for(installed, python):
        path = folder / f"{name}-{installed.version}-py3-none-any.whl"
        _pack(installed, path)
        say(f"{path.name}: of the files installed here")
        return path
    fetched = _fetch(f"{package}=={version(package)}", folder, python)
    say(f"{fetched.name}: fetched")
    return fetched


def _is_for(installed: Distribution, python: str) -> bool:
    """Return whether the installed files are those of any Python, or of the one asked for."""
    tags = [line.partition(": ")[2] for line in (installed.read_text("WHEEL") or "").splitlines() if "Tag: " in line]
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        return True
    return any(tag.split("-")[0].endswith("py3") and tag.split("-")[1] == "none" for tag in tags)


def _pack(installed: Distribution, path: Path) -> None:
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in installed.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                where = Path(str(installed.locate_file(file)))
                if where.is_file():
                    archive.write(where, str(file))


def _fetch(wanted: str, folder: Path, python: str) -> Path:
    before = set(folder.glob("*.whl"))
    words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    words += ["--python-version", python, "--dest", str(folder), wanted]
    for platform in PLATFORMS:
        words += ["--platform", platform]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    new = sorted(set(folder.glob("*.whl")) - before)
    if done.returncode or len(new) != 1:
        raise InputError(f"pip found no wheel of {wanted} for Python {python}: {done.stderr.strip()[-300:]}")
    return new[0]


def unpack(wheels: Iterable[Path], folder: Path) -> list[str]:
    """Unpack wheels into `folder`, a place to import from; return the names of those that were not there. Raises
    `InputError` for a file that is no wheel.
    """
    unpacked = []
    for wheel in wheels:
        done = folder / f".{wheel.name}.unpacked"
        if done.is_file():
            continue
        try:
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.infolist():
                    _extract(archive, entry, folder)
        except zipfile.BadZipFile as error:
            raise InputError(f"{wheel} is no wheel ({error}); carry it there again") from error
        done.touch()
        unpacked.append(wheel.name)
    return unpacked


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> None:
    first, _, rest = entry.filename.partition("/")
    if first.endswith(".data"):
        kind, _, inner = rest.partition("/")
        if kind not in LIBRARIES:
            return
        entry.filename = inner
    if entry.filename:
        archive.extract(entry, folder)
