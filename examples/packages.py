"""Packages of the Python package index and of npm, fetched once with their own clients and kept in the user's cache.

The examples read real models, texts and images that way: the files belong to third parties, so this repository has no
copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
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


class NpmArchive(NamedTuple):
    """The tarball of an npm package.

    Attributes:
        package: its name in the registry, with its scope.
        version: the pinned version.
        sha256: of its bytes, as 64 hexadecimal digits.
    """

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """As `npm pack` names it."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def default_cache_dir() -> Path:
    """The folder peft-composition in the user's cache directory (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-composition"


def fetch(archive: Archive | NpmArchive, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the path of the verified archive, downloading it with pip or npm if the cache does not hold it.

    Args:
        archive: what to fetch.
        cache_dir: where it is kept; default: `default_cache_dir()`.

    Raises:
        RuntimeError: if it cannot be fetched, or is not the pinned file; the message says how to put it there by hand.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    kept = folder / archive.filename
    if kept.is_file() and sha256(kept) == archive.sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if isinstance(archive, NpmArchive):
            _npm_download(archive, Path(scratch))
        else:
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
    raise RuntimeError(
        f"cannot fetch {archive.filename}: pip download {archive.package}=={archive.version} failed with\n"
        f"{_last_words(result.stderr)}\nWithout a package index, put the file {archive.filename} of "
        f"https://pypi.org/project/{archive.package}/{archive.version}/#files into {folder.parent}"
    )


def _npm_download(archive: NpmArchive, folder: Path) -> None:
    name = f"{archive.package}@{archive.version}"
    # A path, as subprocess needs it where npm is a script named npm.cmd.
    npm = shutil.which("npm")
    if npm is None:
        reason = "npm is not installed"
    else:
        command = [npm, "pack", "--silent", "--ignore-scripts", name]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        kept = folder / archive.filename
        found = sha256(kept) if result.returncode == 0 and kept.is_file() else None
        if found == archive.sha256:
            return
        # Silent npm is silent about errors, too; what it knows stands in its log.
        said = _last_words(result.stderr) or f"exit code {result.returncode}"
        reason = (
            f"npm pack {name} failed with\n{said}" if found is None else f"its sha256 is {found}, not {archive.sha256}"
        )
    raise RuntimeError(
        f"cannot fetch {archive.filename}: {reason}\nWithout npm, put the file that "
        f"https://registry.npmjs.org/{archive.package}/{archive.version} names as its tarball into {folder.parent} as "
        f"{archive.filename}"
    )


def _last_words(errors: str) -> str:
    return "\n".join(errors.strip().splitlines()[-5:])
