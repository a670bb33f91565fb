"""Lets several processes of one training build the same composition: rank 0 asks the Hub, the others wait for it.

They communicate through the store of the process group, not through collectives: rank 0 never waits, and a process
that builds a composition alone does not block the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch.distributed as dist

from .. import compat
from ..references import AdapterReference
from .errors import AdapterError
from .files import AdapterFiles
from .files import locate as locate_here


# How often each list of adapters was looked up; all processes do that in the same order.
_calls: Counter[str] = Counter()


def locate(references: Sequence[AdapterReference], with_cards: bool = True) -> list[AdapterFiles]:
    """Like `files.locate`, but with a process group only one process per node downloads.

    Rank 0 asks the Hub for the revisions and downloads. The other processes then use the same commits: on the same
    node from the cache, without a request; on another node the process with `LOCAL_RANK` 0 downloads, and its
    neighbours wait for it. Without a process group no process waits, and the file locks of huggingface_hub prevent
    double downloads.

    Args:
        references: where the adapters are, the same in all processes.
        with_cards: whether to find the cards, too.

    Returns:
        The files, in the order of `references`.

    Raises:
        AdapterError: an adapter was not found or could not be downloaded. An error of rank 0 is raised in all
            processes.
        RuntimeError: rank 0 failed for another reason, or did not find these adapters within the timeout of the group.
    """
    store = _store()
    if store is None:
        return locate_here(references, with_cards)
    call = json.dumps([list(references), with_cards], sort_keys=True)
    _calls[call] += 1
    key = f"peft_composition/{hashlib.sha256(call.encode()).hexdigest()}/{_calls[call]}"
    on_node = f"{key}/{socket.gethostname()}"
    if dist.get_rank() == 0:
        return _announced(store, [key, on_node], lambda: locate_here(references, with_cards))
    if all(os.path.isdir(reference["path"]) for reference in references):
        return locate_here(references, with_cards)
    pinned = [
        AdapterReference(**{**reference, "revision": commit or reference.get("revision")})
        for reference, commit in zip(references, _awaited(store, key, "rank 0"))
    ]
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank == "0":
        files = _announced(store, [on_node], lambda: locate_here(pinned, with_cards))
    else:
        if local_rank is not None:
            _awaited(store, on_node, "the process with LOCAL_RANK 0")
        files = locate_here(pinned, with_cards, progress=False)
    return [replace(file, reference=reference) for file, reference in zip(files, references)]


def _store() -> dist.Store | None:
    """The store of the default process group; None without a group, and for groups that have no store."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return compat.default_store()


def _announced(store: dist.Store, keys: list[str], find: Callable[[], list[AdapterFiles]]) -> list[AdapterFiles]:
    """Call `find`, and tell the waiting processes the commits, or why it failed."""
    message: dict[str, Any] = {}
    try:
        files = find()
        message["commits"] = [file.commit for file in files]
        return files
    except AdapterError as error:
        message.update(adapter=error.adapter_name, reason=error.reason)
        raise
    except BaseException as error:
        message.update(adapter=None, reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        for key in keys:
            store.set(key, json.dumps(message))


def _awaited(store: dist.Store, key: str, who: str) -> list[str | None]:
    """The commits that another process found; waits up to the timeout of the process group."""
    try:
        message = json.loads(store.get(key))
    except dist.DistError as error:
        raise RuntimeError(
            f"{who} did not find the upstream adapters in time: {error}. Build the composition in every process; if "
            "downloads take long, use a longer timeout of the process group (ddp_timeout of the Trainer)."
        ) from error
    if "commits" in message:
        return cast("list[str | None]", message["commits"])
    if message["adapter"] is not None:
        raise AdapterError(message["adapter"], message["reason"])
    raise RuntimeError(f"{who} failed to find the upstream adapters: {message['reason']}")
