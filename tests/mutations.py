"""Ways to break an adapter: each takes a random generator and a folder and says in words what it did."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


CONFIG, WEIGHTS, PICKLE, CARD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"
Mutation = Callable[[random.Random, Path], str]

# What JSON can hold where something else belongs.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 8, 16, 2**31, 2**63, 10**30, 10**400, 0.5, 4.0, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "4", "none", "all", "lora_only", "gaussian", "pissa", "LORA"),
    *("COMPOSITION", "a\nb", "\x1b[2J", "\ud800", "\x00", "é" * 50, "x" * 100_000, "(", "(.*)*!", "*", "all-linear"),
    *([], [[]], [None], ["lin0"], [1, "lin0"], ["("], [[0, 2]], list(range(1000)), {}, {"lin0": 4}, {"lin1": 8}),
    *({"lin0": "4"}, {"lin0": None}, {"": 4}, {"a": {"b": {}}}, {"(": 4}, {".*": 4}, {"lin.": 16}, {"x" * 2000: 4}),
    *({"^lin0$": 16}, {"(.*)*!": 16}, {r"(([\w.])+)+!": 3}, {"lin[01]": 4}, {"lin0": True}, {"lin0": float("nan")}),
]
FIELDS = [
    *("peft_type", "base_model_name_or_path", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "bias", "init_lora_weights", "target_modules", "target_parameters", "modules_to_save"),
    *("layer_replication", "layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out", "revision"),
    *("eva_config", "runtime_config", "use_warp_drive", "warp_config", "warp_factor", "auto_mapping", "enable_lora"),
]
# Keys of patterns that PEFT never finishes to match; none fits a module.
ENDLESS = [
    r"(([\w.])+)+!",
    r"(.*)*!",
    r"(a|a)*b|(\w|\w|\.)*!",
    r"(\w+\.?)+x!",
    r"((((.*)*)*)*)*!",
    "(?:a?){64}" * 20 + "!",
]
KEYS = [
    "lin0",
    "lin1",
    "lin.",
    "l.*0",
    "^lin1",
    "lin[01]",
    "(lin0|lin1)",
    "n0",
    "lin0$",
    r"\w+",
    "",
    ".*",
    "lin0.",
    "x",
]
FRONT_MATTERS = [
    "license: mit",
    "license: [mit, apache-2.0]",
    "license: *a",
    "a: &a [x]\nb: &b [*a, *a]\nlicense: *b",
    "license: " + "[" * 20_000,
    "license: 0x" + "f" * 20_000,
    "license: {a: b}",
    "license: " + "x" * 1000,
    'license: "\\uD800\\e[2J"',
    "license: <script>|`*_[a](javascript:b)",
    "license: !!python/object/apply:os.system [ls]",
    "- license",
    "license",
    "? [license]\n: mit",
    "tags:\n" + "- license\n" * 5000,
    "\u2028license: mit",
]


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def _edit(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**_read(folder), **fields}))


def _flip(draw: random.Random, content: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """The same with some bytes changed, removed or put in."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(start, max(start + 1, min(stop or len(changed), len(changed))))
        kind = draw.randrange(4)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            del changed[place : place + draw.choice([1, 2, 8, 100])]
        else:
            changed[place:place] = draw.choice([b"\0", b"{", b'"', b"[" * 50, b"9" * 30, b"\xff\xfe", b",", b"NaN"])
    return bytes(changed)


# The config


def field_of_config(draw: random.Random, folder: Path) -> str:
    changes = {draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.choice([1, 1, 2]))}
    _edit(folder, **changes)
    return f"config: {str(changes)[:200]}"


def pattern_of_config(draw: random.Random, folder: Path) -> str:
    field = draw.choice(["rank_pattern", "alpha_pattern"])
    keys = [draw.choice([*KEYS, *ENDLESS, *KEYS]) for _ in range(draw.randrange(1, 4))]
    pattern = {key: draw.choice([4, 4, 4, 16, 0.5]) for key in keys}
    _edit(folder, **{field: pattern})
    return f"config: {field}={str(pattern)[:200]}"


def missing_field(draw: random.Random, folder: Path) -> str:
    config = _read(folder)
    gone = draw.sample(sorted(config), draw.choice([1, 3, 10]))
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if key not in gone}))
    return f"config: without {gone}"


def text_of_config(draw: random.Random, folder: Path) -> str:
    file = folder / CONFIG
    content = file.read_bytes()
    kind = draw.randrange(8)
    if kind < 4:
        file.write_bytes(_flip(draw, content))
    elif kind == 4:
        file.write_bytes(content[: draw.randrange(len(content))])
    elif kind == 5:
        name, value = draw.choice(["r", "lora_alpha", "peft_type"]), draw.choice(["2", "1e999", "NaN", "9" * 5000])
        file.write_bytes(content.rstrip()[:-1] + f', "{name}": {value}}}'.encode())
    elif kind == 6:
        file.write_bytes(draw.choice([b"\xef\xbb\xbf", b" " * 100_000, b"\xff\xfe"]) + content)
    else:
        depth = draw.choice([10, 900, 100_000])
        file.write_bytes(content.rstrip()[:-1] + b', "modules_to_save": ' + b"[" * depth + b"]" * depth + b"}")
    return f"config as text, kind {kind}"


# The tensors


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def values_of_tensors(draw: random.Random, folder: Path) -> str:
    tensors = _tensors(folder)
    key = draw.choice(sorted(tensors))
    value = draw.choice([float("nan"), float("inf"), 1e30, 3e38, -3e38, 1e-45, 0.0, 7.0])
    flat = tensors[key].view(-1)
    flat[draw.randrange(flat.numel())] = value
    save_file(tensors, folder / WEIGHTS)
    return f"{value} in {key}"


def dtype_of_tensors(draw: random.Random, folder: Path) -> str:
    tensors = _tensors(folder)
    dtype = draw.choice(
        [
            *(torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.uint8),
            *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16),
        ]
    )
    keys = draw.sample(sorted(tensors), draw.choice([1, len(tensors)]))
    for key in keys:
        tensors[key] = tensors[key].to(dtype)
    save_file(tensors, folder / WEIGHTS)
    return f"{dtype} in {len(keys)} tensors"


def shape_of_tensors(draw: random.Random, folder: Path) -> str:
    tensors = _tensors(folder)
    key = draw.choice(sorted(tensors))
    tensor = tensors[key]
    change: Callable[[Tensor], Tensor] = draw.choice(
        [
            lambda t: t.T,
            lambda t: t[:1],
            lambda t: t[:, :1],
            lambda t: t[:0],
            lambda t: t[:, :0],
            lambda t: t.reshape(-1),
            lambda t: t.sum(),
            lambda t: t[None],
            lambda t: t[..., None],
            lambda t: torch.cat([t, t]),
            lambda t: torch.cat([t, t], 1),
        ]
    )
    tensors[key] = change(tensor).contiguous()
    save_file(tensors, folder / WEIGHTS)
    return f"{key} is {tuple(tensors[key].shape)}, was {tuple(tensor.shape)}"


def names_of_tensors(draw: random.Random, folder: Path) -> str:
    tensors = _tensors(folder)
    key = draw.choice(sorted(tensors))
    kind = draw.randrange(4)
    if kind == 0:
        del tensors[key]
        what = f"without {key}"
    else:
        new = draw.choice(
            [
                key.replace("lora_A", "lora_B"),
                key.replace("lora_B", "lora_A"),
                key.replace("lin0", "lin1"),
                key.replace("lin", "other"),
                key.replace(".weight", ".default.weight"),
                key.replace(".weight", ".bias"),
                key.replace("base_model.model.", ""),
                key.replace("base_model.model.", "base_model.model._orig_mod."),
                key.replace("lora_", "lora_embedding_"),
                key.replace("lora_A", "lora_magnitude_vector"),
                "base_model.model.head.weight",
                "x" * 5000,
                "base_model.model." + "a." * 300 + "lora_A.weight",
                "\x1b[2J\n.lora_A.weight",
                ".lora_A.weight",
                "",
            ]
        )
        tensor = tensors[key] if kind == 1 else tensors.pop(key)
        tensors[new] = tensor.clone()
        what = f"{key} {'also' if kind == 1 else 'is'} {new[:80]!r}"
    save_file(tensors, folder / WEIGHTS)
    return what


def many_tensors(draw: random.Random, folder: Path) -> str:
    tensors = _tensors(folder)
    extra = draw.choice(["base_model.model.head.{}.weight", "base_model.model.m{}.lora_A.weight", "{}"])
    tensors.update({extra.format(number): torch.ones(1, 1) for number in range(3000)})
    save_file(tensors, folder / WEIGHTS)
    return f"3000 tensors {extra}"


# The safetensors file


def bytes_of_safetensors(draw: random.Random, folder: Path) -> str:
    file = folder / WEIGHTS
    content = file.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    kind = draw.randrange(6)
    if kind == 0:
        file.write_bytes(_flip(draw, content, 0, 8))
    elif kind < 3:
        file.write_bytes(_flip(draw, content, 8, 8 + header))
    elif kind == 3:
        place = draw.randrange(8 + header, len(content))
        file.write_bytes(content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :])
    elif kind == 4:
        file.write_bytes(content[: draw.randrange(len(content))])
    else:
        size = draw.choice([0, 1, header - 1, header + 1, 2**31, 2**63, 2**64 - 1, 100_000_001])
        file.write_bytes(struct.pack("<Q", size) + content[8:])
    return f"safetensors bytes, kind {kind}"


def header_of_safetensors(draw: random.Random, folder: Path) -> str:
    file = folder / WEIGHTS
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    keys = [key for key in header if key != "__metadata__"]
    first, second = draw.sample(keys, 2)
    kind = draw.randrange(10)
    entry = header[first]
    begin, end = entry["data_offsets"]
    if kind == 0:
        entry["data_offsets"] = header[second]["data_offsets"]
    elif kind == 1:
        entry["data_offsets"] = draw.choice([[end, begin], [begin + 4, end + 4], [begin, end + 2**40], [-4, end], []])
    elif kind == 2:
        entry["shape"] = draw.choice(
            [[-1, 4], [2**40, 2**40], [], [0], [4, 5, 2], [2**63], [4.0, 10], entry["shape"][::-1]]
        )
    elif kind == 3:
        entry["dtype"] = draw.choice(["F64", "F16", "I32", "U32", "BF16", "F4", "Q8", "", 5, None, "F8_E4M3", "BOOL"])
    elif kind == 4:
        header["__metadata__"] = draw.choice([{"a": 1}, [], {"format": "tf"}, "x", {"x" * 10_000: "y"}, None])
    elif kind == 5:
        header[first] = draw.choice([{}, [], None, "x", {**entry, "more": 1}, {"shape": entry["shape"]}])
    elif kind == 6:
        header["empty"] = {"dtype": "F32", "shape": [0, 2**50], "data_offsets": [len(data), len(data)]}
    elif kind == 7:
        data += b"\0" * draw.choice([1, 4, 4096])
    text = json.dumps(header)
    if kind == 8:  # the same key twice
        text = text[:-1] + f", {json.dumps(first)}: {json.dumps(header[second])}}}"
    elif kind == 9:
        text = " " * draw.choice([1, 7, 100_000]) + text
    encoded = text.encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return f"safetensors header, kind {kind}, {first}"


# Pickles


class Trap:
    """Code that would run on loading."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, ("/nonexistent/owned",)


def content_of_pickle(draw: random.Random, folder: Path) -> str:
    state: dict[Any, Any] = _tensors(folder)
    (folder / WEIGHTS).unlink()
    key = draw.choice(sorted(state))
    kind = draw.randrange(12)
    zipped = draw.random() < 0.6
    content: Any = state
    if kind == 1:
        state[key] = nn.Parameter(state[key])
    elif kind == 2:
        state[key] = state[key].flatten()[:1].expand(1 << 12, 1 << 12)
    elif kind == 3:
        state[key] = state[key].T.contiguous().T
    elif kind == 4:
        state[key] = draw.choice([None, 5, "x", [state[key]], {"a": state[key]}, state[key].numpy().tolist()])
    elif kind == 5:
        state[key] = state[key].to_sparse()
    elif kind == 6:
        state[key] = draw.choice([torch.empty(4, 10, device="meta"), torch.tensor(0.0), torch.zeros(0, 3)])
    elif kind == 7:
        state[draw.choice([5, None, (1, 2), "\ud800", "x" * 5000])] = torch.ones(1)
    elif kind == 8:
        content = draw.choice([[state], {"state_dict": state}, {"model": state}, state[key], None, 5, nn.Linear(2, 2)])
    elif kind == 9:
        content = {**state, "trap": Trap()}
    elif kind == 10:
        whole = torch.cat([tensor.flatten() for tensor in state.values()])
        place = 0
        for name, tensor in list(state.items()):  # all in one storage
            state[name] = whole[place : place + tensor.numel()].view(tensor.shape)
            place += tensor.numel()
    elif kind == 11:
        (folder / PICKLE).write_bytes(pickle.dumps(draw.choice([{"a": 1}, Trap(), [1] * 1000])))
        return "a pickle of another kind"
    torch.save(content, folder / PICKLE, _use_new_zipfile_serialization=zipped)
    return f"pickle, kind {kind}, {'zip' if zipped else 'legacy'}"


def _addresses(tensors: dict[str, Tensor]) -> list[bytes]:
    """What PyTorch's older format calls the storages of these tensors, and sorts them by."""
    return [str(tensor.untyped_storage()._cdata).encode() for tensor in tensors.values()]


def _in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies whose storages lie in the order of their keys: otherwise no two runs would break the same file."""
    tried = []
    while True:
        tried.append({key: tensor.clone() for key, tensor in tensors.items()})
        found = _addresses(tried[-1])
        if found == sorted(found) and len({*map(len, found)}) == 1:
            return tried[-1]


def bytes_of_pickle(draw: random.Random, folder: Path) -> str:
    zipped = draw.random() < 0.6
    tensors = _tensors(folder) if zipped else _in_order(_tensors(folder))
    torch.save(tensors, folder / PICKLE, _use_new_zipfile_serialization=zipped)
    (folder / WEIGHTS).unlink()
    content = (folder / PICKLE).read_bytes()
    if not zipped:
        for number, address in enumerate(_addresses(tensors)):
            content = content.replace(address, b"%0*d" % (len(address), number + 1))
    content = _flip(draw, content) if draw.random() < 0.7 else content[: draw.randrange(len(content))]
    (folder / PICKLE).write_bytes(content)
    return f"bytes of a pickle, {'zip' if zipped else 'legacy'}"


# The card and the files


def card(draw: random.Random, folder: Path) -> str:
    text = draw.choice(FRONT_MATTERS)
    content = f"---\n{text}\n---\n# Title\n".encode()
    if draw.random() < 0.5:
        content = _flip(draw, content, 0, 200)
    (folder / CARD).write_bytes(content)
    return f"card: {content[:100]!r}"


def kind_of_file(draw: random.Random, folder: Path) -> str:
    name = draw.choice([CONFIG, WEIGHTS, CARD])
    path = folder / name
    kind = draw.choice(["gone", "empty", "folder", "pipe", "loop", "dangling", "device", "sparse", "link"])
    content = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(folder / "nothing")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.write_bytes(content)
        os.truncate(path, 10 << 30)
    elif kind == "link":
        (folder / "elsewhere").write_bytes(content)
        path.symlink_to(folder / "elsewhere")
    return f"{name}: {kind}"


def harmless(draw: random.Random, folder: Path) -> str:
    """What changes nothing of the product: composing it is right."""
    kind = draw.randrange(4)
    if kind == 0:
        (folder / CONFIG).write_text(json.dumps(_read(folder), indent=draw.choice([None, 1, 8]), sort_keys=True))
    elif kind == 1:
        config = [*_read(folder).items()]
        draw.shuffle(config)
        (folder / CONFIG).write_text(json.dumps(dict(config)))
    elif kind == 2:
        tensors = [*_tensors(folder).items()]
        draw.shuffle(tensors)
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    else:
        torch.save(_tensors(folder), folder / PICKLE)
        (folder / WEIGHTS).unlink()
    return f"harmless, kind {kind}"


# By kind, with how often each is taken.
MUTATIONS: dict[str, tuple[list[Mutation], int]] = {
    "config": ([field_of_config, field_of_config, pattern_of_config, missing_field, text_of_config], 9),
    "tensors": ([values_of_tensors, dtype_of_tensors, shape_of_tensors, names_of_tensors, many_tensors], 6),
    "safetensors": ([bytes_of_safetensors, header_of_safetensors], 5),
    "pickles": ([content_of_pickle, bytes_of_pickle], 4),
    "cards": ([card], 2),
    "files": ([kind_of_file], 2),
    "harmless": ([harmless], 1),
}
