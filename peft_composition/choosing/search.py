"""Searches the Hub for adapters of a base model, and tells from their configs alone whether they can be composed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError
from huggingface_hub.utils import tqdm
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..references import AdapterReference, is_hub_id
from ..text import LONG, one_line, quoted
from ..upstream.base_names import original, without_owner
from ..upstream.errors import AdapterError
from ..upstream.files import PARALLEL_DOWNLOADS, download_files
from ..upstream.plain import require_plain_lora
from ..upstream.schema import read_adapter_config


MOST_COPIES = 20  # copies of a base whose adapters are listed, too
LOOKED_AT = 20  # for each adapter that is wanted, so many are looked at before the search gives up
_EXPAND: list[Any] = ["downloads", "gated", "lastModified", "tags"]


@dataclass
class FoundAdapter:
    """An adapter on the Hub, as far as its entry and its config tell.

    Attributes:
        id: of its repository.
        base: the base model that its config names, or else that by which it was found.
        ranks: smallest and largest rank.
        targets: modules that it changes, as its config names them.
        task: the task type that its config states.
        license: as its repository states it.
        downloads: in the last 30 days, as the Hub counts.
        updated: date of the last change, YYYY-MM-DD.
        bytes: size of its weights file.
        commit: that was looked at.
        reason: why it cannot be composed; None where its config speaks for it. Its weights were not looked at.
    """

    id: str
    base: str
    ranks: tuple[int, int] | None = None
    targets: list[str] = field(default_factory=list)
    task: str | None = None
    license: str | None = None
    downloads: int = 0
    updated: str | None = None
    bytes: int | None = None
    commit: str | None = None
    reason: str | None = None

    @property
    def is_composable(self) -> bool:
        """Whether nothing in its config speaks against composing it."""
        return self.reason is None


def search_adapters(
    base: str,
    *,
    task: str | None = None,
    most_rank: int | None = None,
    licenses: Sequence[str] = (),
    min_downloads: int = 0,
    author: str | None = None,
    tags: Sequence[str] = (),
    with_copies: bool = True,
    limit: int = 100,
    token: str | None = None,
) -> list[FoundAdapter]:
    """Find the adapters on the Hub that were trained on a base model.

    They are found by the Hub's `base_model:adapter:` tags. Of each, its `adapter_config.json` is read and the size of
    its weights asked for; no weights are downloaded.

    Args:
        base: Hub id of the base model.
        task: only adapters with this task type in their config.
        most_rank: only adapters whose largest rank is at most this.
        licenses: only adapters with one of these licenses, as the Hub names them ("apache-2.0").
        min_downloads: only adapters with so many downloads in 30 days.
        author: only those of a user or organisation.
        tags: only those with all of these tags.
        with_copies: whether to list adapters of copies of the base, too, such as 4-bit ones, and where the base is
            such a copy, those of its original.
        limit: how many to return at most; those with the most downloads come first.
        token: for the Hub. Default: the one that is logged in.

    Returns:
        The adapters, also those that cannot be composed, with the reason.

    Raises:
        ValueError: `base` is not a Hub id, or the limit is below 1.
        RuntimeError: the Hub could not be asked.

    Example:
        >>> found = search_adapters("ORG/MODEL", task="SEQ_CLS", licenses=["apache-2.0", "mit"])
        >>> selection = select_adapters(model, [own.id for own in found if own.is_composable], support)
    """
    if not is_hub_id(base) or "/" not in base:
        raise ValueError(f"base must be the Hub id of a model, like org/model, got {quoted(base)}")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    api = HfApi(token=token)
    bases = [base, *(_copies(api, base) if with_copies else ())]
    wanted = set(map(str.lower, licenses))
    entries = _asked(api, bases, author, tags, min_downloads, limit * LOOKED_AT)
    entries = [own for own in entries if not wanted or (_license(own[0]) or "").lower() in wanted]
    found: list[FoundAdapter] = []
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool, tqdm(desc="Reading configs", unit="adapter") as bar:
        for start in range(0, len(entries), 2 * PARALLEL_DOWNLOADS):
            part = entries[start : start + 2 * PARALLEL_DOWNLOADS]
            for adapter in pool.map(lambda own: _read(api, own[0], own[1], base), part):
                bar.update()
                is_small = most_rank is None or adapter.ranks is None or adapter.ranks[1] <= most_rank
                if is_small and (task is None or adapter.task in (task, None)):
                    found.append(adapter)
            if len(found) >= limit:
                break
    return found[:limit]


def _copies(api: HfApi, base: str) -> Iterator[str]:
    """Models that are the base in another format, by the Hub's tags and by their names; its original among them."""
    try:
        origins = [
            tag.removeprefix(f"base_model:{relation}:")
            for relation in ("quantized", "finetune")
            for tag in api.model_info(base).tags or ()
            if tag.startswith(f"base_model:{relation}:")
        ]
    except Exception:  # a private, gated or removed base may still have adapters
        origins = []
    origins = [own for own in origins if original(own) == original(base) and own != base and is_hub_id(own)]
    yield from origins
    origin = origins[0] if origins else base
    seen = {base, *origins}
    for relation in ("quantized", "finetune"):
        listed = _listed(api, filter=f"base_model:{relation}:{origin}", search=without_owner(origin))
        copies = (own.id for own in listed if original(own.id) == original(origin) and own.id not in seen)
        for copy in islice(copies, MOST_COPIES):
            seen.add(copy)
            yield copy


def _asked(
    api: HfApi, bases: Iterable[str], author: str | None, tags: Sequence[str], min_downloads: int, most: int
) -> list[tuple[Any, str]]:
    """The Hub's entries with the base by which they were found, the most downloaded first."""
    found: dict[str, tuple[Any, str]] = {}
    for base in bases:
        names = [f"base_model:adapter:{base}", *tags]
        for entry in islice(_listed(api, filter=names, author=author), most):
            if (entry.downloads or 0) < min_downloads:
                break  # they come in the order of downloads
            found.setdefault(entry.id, (entry, base))
    return sorted(found.values(), key=lambda own: (-(own[0].downloads or 0), own[0].id))


def _listed(api: HfApi, **wanted: Any) -> Iterator[Any]:
    try:
        yield from api.list_models(sort="downloads", expand=_EXPAND, **wanted)
    except Exception as error:  # of the Hub, its HTTP client or the network
        raise RuntimeError(
            f"the Hub could not be asked for models with {one_line(wanted['filter'])}: "
            f"{one_line(error, 600) or type(error).__name__}"
        ) from error


def _license(entry: Any) -> str | None:
    stated = [tag.removeprefix("license:") for tag in entry.tags or () if tag.startswith("license:")]
    return one_line(", ".join(stated)) or None


def _read(api: HfApi, entry: Any, found_by: str, base: str) -> FoundAdapter:
    """An adapter's row; whatever is wrong with it is its reason."""
    found = FoundAdapter(entry.id, found_by, license=_license(entry), downloads=entry.downloads or 0)
    found.updated = entry.last_modified.date().isoformat() if entry.last_modified else None
    try:
        path = download_files(AdapterReference(path=entry.id, name=entry.id), CONFIG_NAME, None)
        if path is None:
            raise AdapterError(entry.id, f"it has no {CONFIG_NAME}")
        config = read_adapter_config(path)
        _describe(found, config)
        require_plain_lora(entry.id, config)
        stated = config.get("base_model_name_or_path")
        if isinstance(stated, str) and is_hub_id(stated) and original(stated) != original(base):
            raise AdapterError(
                entry.id, f"its config says that it was trained on {quoted(stated)}, not on {quoted(base)}"
            )
        _measure(api, found)
    except AdapterError as error:
        found.reason = error.reason
    except Exception as error:  # a hostile config, the network
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        found.reason = one_line(f"{kind}{error}", LONG)
    return found


def _describe(found: FoundAdapter, config: dict[str, Any]) -> None:
    found.base = config.get("base_model_name_or_path") or found.base
    found.task = config.get("task_type")
    ranks = [own for own in (config.get("r"), *(config.get("rank_pattern") or {}).values()) if isinstance(own, int)]
    found.ranks = (min(ranks), max(ranks)) if ranks else None
    targets = config.get("target_modules") or config.get("target_parameters") or []
    found.targets = [targets] if isinstance(targets, str) else sorted(targets)


def _measure(api: HfApi, found: FoundAdapter) -> None:
    """Ask for the size of the weights, which stay where they are."""
    for filename in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        try:
            metadata = get_hf_file_metadata(hf_hub_url(found.id, filename, endpoint=api.endpoint), token=api.token)
        except GatedRepoError:
            raise AdapterError(
                found.id, "it is gated: accept its terms on the Hub and log in (hf auth login)"
            ) from None
        except EntryNotFoundError:
            continue
        found.bytes, found.commit = metadata.size, metadata.commit_hash
        return
    raise AdapterError(found.id, f"it has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")
