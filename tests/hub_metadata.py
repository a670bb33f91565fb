"""What the Hub refuses in the metadata of a model card, as far as its documentation says so.

From the model card specification and the pages on model cards and licenses in the Hub's documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml


RELATIONS = ("adapter", "finetune", "merge", "quantized")
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
    zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
""".split()  # noqa: SIM905  (a table of words)
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_BLOCK = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def errors_in(content: str) -> list[str]:
    """What is wrong with the metadata of a card; a card without any has no errors (the Hub warns)."""
    block = _BLOCK.match(content)
    if block is None:
        return []
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(metadata, dict):
        return [] if metadata is None else ["the metadata must be a mapping"]
    return [*_errors(metadata)]


def _errors(metadata: dict[str, Any]) -> Iterator[str]:
    for key in ("base_model", "datasets", "language", "license", "metrics", "tags"):
        values = metadata.get(key, [])
        if values is None or not all(isinstance(value, str) and value for value in _listed(values)):
            yield f'"{key}" must be a string or an array of strings'
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if key in metadata and not isinstance(metadata[key], str):
            yield f'"{key}" must be a string'
    for value in _listed(metadata.get("license")):
        if value not in LICENSES:
            yield f'"license" must be one of {LICENSES}, not {value!r}'
    for key in ("base_model", "datasets"):
        for value in _listed(metadata.get(key)):
            if not _HUB_ID.fullmatch(str(value)):
                yield f'"{key}" with value {value!r} is not valid. Use a model id from https://hf.co/models.'
    if metadata.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        yield f'"base_model_relation" must be one of {RELATIONS}'
    for model in metadata.get("model-index") or []:
        yield from _errors_in_results(model)


def _errors_in_results(model: dict[str, Any]) -> Iterator[str]:
    if not isinstance(model.get("name"), str):
        yield '"model-index[0].name" must be a string'
    for result in model.get("results", ()):
        for part, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
            for key in needed:
                if not isinstance(result.get(part, {}).get(key), str):
                    yield f'"model-index[0].results[0].{part}.{key}" is required'
        for metric in result.get("metrics") or [{}]:
            for key in ("type", "value"):
                if key not in metric:
                    yield f'"model-index[0].results[0].metrics[0].{key}" is required'


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
