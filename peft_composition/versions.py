"""The oldest supported versions of other packages; older ones are refused at import, with their names."""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version


# As in setup.cfg, which is missing when the sources are used from PYTHONPATH.
MINIMUM = {
    "torch": "2.8",
    "peft": "0.21.0",
    "transformers": "5.16",
    "accelerate": "1.3",
    "safetensors": "0.8",
    "huggingface_hub": "1.11",
}


def require_supported_versions() -> None:
    """Refuse packages that are missing or too old, all in one error.

    Only the release counts: vendor builds of PyTorch have versions such as 2.8.0a0+34c6371d24.

    Raises:
        ImportError: the message names each package with its installed version and says what to install.
    """
    faults, needed = [], []
    for name, minimum in MINIMUM.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed is not None and Version(installed).release >= Version(minimum).release:
            continue
        found = "is not installed" if installed is None else f"{installed} is installed"
        faults.append(f"{name} {minimum} or newer but {found}" if installed else f"{name}, which {found}")
        needed.append(f'"{name}>={minimum}"')
    if faults:
        raise ImportError(f"peft-composition needs {', and '.join(faults)}; run: pip install {' '.join(needed)}")


def unknown_versions(error: ImportError) -> ImportError:
    """The error if a package is recent enough but lacks something that this package needs."""
    installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in MINIMUM)
    return ImportError(
        f"peft-composition does not work with these versions: {error}. Installed are {installed}. If one of them is "
        "newer than this package, run: pip install --upgrade peft-composition, or install an older release of it."
    )
