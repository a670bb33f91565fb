"""Reads saved LoRA adapters, from the Hub or a folder, and turns them into checked, stacked factors per module.

Everything that can be wrong with an adapter is found here, before a model is changed. No torch modules live here.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

from peft.utils import CONFIG_NAME

from ..names import LORA_SUBFOLDER
from ..references import AdapterReference, Provenance, is_local
from .errors import AdapterError
from .files import AdapterFiles, download_files
from .front_matter import stated_license
from .keys import FactorKeys, index_factors
from .plain import require_plain_lora
from .schema import read_adapter_config
from .weights import PARALLEL_HASHES, WeightsFile, sha256_of


logger = logging.getLogger(__name__)


@dataclass
class UpstreamAdapter:
    """One adapter, read and checked: its factors by the module names of its own checkpoint.

    Attributes:
        name: name in the composition.
        config: its `adapter_config.json`.
        weights: its tensors, read on demand.
        modules: factors by module name, as spelled in the checkpoint.
        extras: entries that are not LoRA factors (heads, embeddings); they are not mixed.
        files: where it was found.
        sha256: the hash of its weights, which may still be being computed.
    """

    name: str
    config: dict[str, Any]
    weights: WeightsFile
    modules: dict[str, FactorKeys]
    extras: list[str]
    files: AdapterFiles
    sha256: Future[str]

    @property
    def provenance(self) -> Provenance:
        """What a composition records about it; waits for the hash."""
        return Provenance(
            name=self.name,
            path=self.files.reference["path"],
            subfolder=self.files.reference.get("subfolder"),
            commit=self.files.commit,
            sha256=self.sha256.result(),
            base_model_name_or_path=self.config.get("base_model_name_or_path"),
            license=stated_license(self.files.card),
        )


def read_adapters(
    files: Sequence[AdapterFiles], expected_sha256: Sequence[str | None], hashed: bool = True
) -> list[UpstreamAdapter]:
    """Read the configs and the tensor indices of adapters and check that they are plain LoRAs.

    Their weights are hashed in background threads; `UpstreamAdapter.provenance` waits for the result.

    Args:
        files: the files of the adapters.
        expected_sha256: for each adapter the recorded hash of its weights, or None. It is checked before the weights
            are opened.
        hashed: whether `provenance` will be used.

    Returns:
        The adapters, in the order of `files`; the values of their tensors are read later, in `stack`.

    Raises:
        AdapterError: an adapter is not a LoRA, is a variant that is not a plain product, lacks a factor, or has
            another hash.
    """
    pool, refused = ThreadPoolExecutor(PARALLEL_HASHES), Event()
    hashes = [
        pool.submit(sha256_of, file.weights, refused) if hashed or sha256 else _never()
        for file, sha256 in zip(files, expected_sha256)
    ]
    try:
        return [_read_adapter(*entry) for entry in zip(files, hashes, expected_sha256)]
    except BaseException:
        refused.set()
        pool.shutdown(cancel_futures=True)  # the rest need not be hashed
        raise
    finally:
        pool.shutdown(wait=False)


def _never() -> Future[str]:
    """In place of a hash that is not needed."""
    future: Future[str] = Future()
    future.cancel()
    return future


def _read_adapter(files: AdapterFiles, sha256: Future[str], expected_sha256: str | None) -> UpstreamAdapter:
    name = files.name
    config = read_config(files)
    if config["peft_type"] == "COMPOSITION":
        raise AdapterError(name, _of_composition(files))
    require_plain_lora(name, config)
    if expected_sha256 is not None and sha256.result() != expected_sha256:
        raise AdapterError(
            name,
            f"its weights have changed: recorded sha256 {expected_sha256}, but {files.weights} has {sha256.result()}",
        )
    weights = WeightsFile(name, files.weights)
    modules, extras = index_factors(name, config, weights)
    return UpstreamAdapter(name, config, weights, modules, extras, files, sha256)


def _of_composition(files: AdapterFiles) -> str:
    """Why a composition cannot be composed itself, and how to compose the LoRA that it exports to."""
    path, subfolder = files.reference["path"], files.reference.get("subfolder")
    exported = f"{subfolder}/{LORA_SUBFOLDER}" if subfolder else LORA_SUBFOLDER
    if is_local(path):
        is_there = (files.config.parent / LORA_SUBFOLDER / CONFIG_NAME).is_file()
        command = shlex.join(["peft-composition", "export", str(files.config.parent), "--out", "NEW_FOLDER"])
    else:
        inner = AdapterReference(**{**files.reference, "subfolder": exported})
        try:
            is_there = download_files(inner, CONFIG_NAME, files.commit) is not None
        except AdapterError:
            is_there = False
        command = "load it (PeftModel.from_pretrained) and to_lora(model).save_pretrained(NEW_FOLDER)"
    if is_there:
        return (
            f"it is itself a composition. Its folder {LORA_SUBFOLDER!r} holds it as a plain LoRA, which can be "
            f'composed: {{"path": "{path}", "subfolder": "{exported}"}}'
        )
    return f"it is itself a composition. Export it as a plain LoRA, which can be composed: {command}"


def read_config(files: AdapterFiles) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter of any kind.

    Raises:
        AdapterError: it is damaged, does not describe a PEFT adapter, or has a field with an invalid value.
    """
    try:
        return read_adapter_config(files.config)
    except ValueError as error:
        raise AdapterError(files.name, str(error)) from error
