"""Several processes of one training that build the same composition: rank 0 asks the Hub, the others wait for it.

They talk through the store of the process group and not through collectives: rank 0 never waits, and a process that
builds a composition for itself blocks nobody.
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


# How often each list of adapters was looked for; the processes do so in the same order.
_calls: Counter[str] = Counter()


def locate(references: Sequence[AdapterReference], with_cards: bool = True) -> list[AdapterFiles]:
    """As `files.locate`; where a process group is initialised, only one process per node downloads.

    Rank 0 asks the Hub what the revisions are and downloads. The others then take the same commits: from the cache
    that they share with it, without a request; on another node the process with `LOCAL_RANK` 0 downloads, and its
    neighbours wait for it. Without a process group nobody waits, and the client's file locks see to it that
    no file is downloaded twice at the same time.

    Args:
        references: where the adapters are, the same in all processes.
        with_cards: whether the cards are wanted, too.

    Returns:
        The files, in the order of `references`.

    Raises:
        AdapterError: an adapter cannot be had. What rank 0 finds wrong is raised in every process.
        RuntimeError: rank 0 failed otherwise, or did not look for these adapters within the timeout of the group.
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
    """What the processes of the default group share; None for a process alone, and for groups that have no store."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return compat.default_store()


def _announced(store: dist.Store, keys: list[str], find: Callable[[], list[AdapterFiles]]) -> list[AdapterFiles]:
    """What `find` returns, once those who wait know the commits; or that it failed, and why."""
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
    """The commits that another process found; waits as long as the process group lets anything wait."""
    try:
        message = json.loads(store.get(key))
    except dist.DistError as error:
        raise RuntimeError(
            f"{who} has not found the upstream adapters in time: {error}. Every process must build the composition; "
            "for downloads that take long, raise the timeout of the process group (ddp_timeout of the Trainer)."
        ) from error
    if "commits" in message:
        return cast("list[str | None]", message["commits"])
    if message["adapter"] is not None:
        raise AdapterError(message["adapter"], message["reason"])
    raise RuntimeError(f"{who} failed to find the upstream adapters: {message['reason']}")
