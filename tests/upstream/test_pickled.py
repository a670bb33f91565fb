"""Pickled adapters: read rightly in whatever form, refused where the file does not hold what it says."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_composition.upstream import pickled

from .. import tiny
from ..reference import Reference
from .test_adapters import as_pickle, assert_products, compose, edit_config, refuse


A, B = "base_model.model.lin0.lora_A.weight", "base_model.model.lin0.lora_B.weight"


@pytest.fixture
def bad(bad: Path) -> Path:
    """A pickled LoRA, called 'bad', for a test to break."""
    return as_pickle(bad)


def reference_of(folder: Path) -> Reference:
    """What a pickled adapter should give, from a copy of it as safetensors."""
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    plain = {key: t.detach().resolve_neg().contiguous().clone() for key, t in state.items()}
    save_file(plain, folder / "adapter_model.safetensors")
    reference = Reference(tiny.build("mlp").double(), [folder])
    (folder / "adapter_model.safetensors").unlink()
    return reference


def edit_pickle(folder: Path, edit: Callable[[dict[str, Any]], object], **options: Any) -> Path:
    """Change the content of a pickled adapter; `edit` changes it in place or returns another."""
    file = folder / "adapter_model.bin"
    state = torch.load(file, weights_only=True)
    changed = edit(state)
    torch.save(state if changed is None else changed, file, **options)
    return folder


def edit_records(
    folder: Path, edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED, **more: bytes
) -> None:
    """Write the zip file anew, with other records; `more` are added."""
    file = folder / "adapter_model.bin"
    with zipfile.ZipFile(file) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, edit(name, content))
        for name, content in more.items():
            archive.writestr(f"adapter_model/{name}", content)


def is_data(name: str) -> bool:
    return "/data/" in name


# What is right


def test_compressed_records_are_unpacked(bad: Path) -> None:
    """PyTorch's mapped reading takes the compressed bytes for values."""
    reference = reference_of(bad)
    edit_records(bad, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert_products(compose(tiny.build("mlp").double(), bad), reference)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "kind",
    [
        lambda t: nn.Parameter(t),
        lambda t: t.clone().requires_grad_(),
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t, t])[len(t) :],
        lambda t: torch.complex(t, -t).conj().imag,
        lambda t: t.half(),
        lambda t: t.bfloat16(),
        lambda t: t.double(),
    ],
    ids=["Parameter", "requires_grad", "transposed", "slice", "negative view", "fp16", "bf16", "fp64"],
)
def test_every_form_in_which_factors_are_saved(kind: Callable[[Tensor], Tensor], zipped: bool, bad: Path) -> None:
    edit_pickle(
        bad,
        lambda state: OrderedDict((key, kind(t)) for key, t in state.items()),
        _use_new_zipfile_serialization=zipped,
    )
    reference = reference_of(bad)
    assert_products(compose(tiny.build("mlp").double(), bad), reference)


def test_a_tensor_under_two_keys(bad: Path) -> None:
    reference = reference_of(bad)
    tied = torch.rand(16, 40)
    edit_pickle(bad, lambda state: state.update({"head.weight": tied, "table.weight": tied, "nothing": torch.ones(0)}))
    with pytest.warns(UserWarning, match=r"not mixed: 'bad': head\.weight, table\.weight, nothing"):
        model = compose(tiny.build("mlp").double(), bad)
    assert_products(model, reference)


# What is not


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "compressed"])
@pytest.mark.parametrize(
    "cut",
    [lambda content: content[:-4], lambda content: content[:8], lambda content: b"", lambda content: content * 2],
    ids=["short", "8 bytes", "empty", "too long"],
)
def test_records_of_another_size(cut: Callable[[bytes], bytes], compression: int, good: Path, bad: Path) -> None:
    """PyTorch's mapped reading goes on into what comes behind the record."""
    edit_records(bad, lambda name, content: cut(content) if is_data(name) else content, compression)
    refuse(tiny.build("mlp"), good, bad, message=f"adapter 'bad': {bad}/adapter_model.bin is")


def test_a_storage_without_a_record_of_its_size(bad: Path) -> None:
    """For versions of PyTorch that do not compare sizes themselves."""
    tensors = pickled.load(bad / "adapter_model.bin")
    records = {str(number): tensor.nbytes for number, tensor in enumerate(tensors.values())}
    pickled._require_whole_storages(tensors, records)
    with pytest.raises(pickled.UnreadablePickleError, match=r"it lacks records of 160 bytes"):
        pickled._require_whole_storages(tensors, {**records, "0": 156})


def test_a_bit_that_flipped(good: Path, bad: Path) -> None:
    """PyTorch reads over it, though the file tells."""
    file = bad / "adapter_model.bin"
    values = load_file(good / "adapter_model.safetensors")[A].numpy().tobytes()
    edit_pickle(bad, lambda state: state.update({A: torch.frombuffer(bytearray(values), dtype=torch.float32)}))
    edit_pickle(bad, lambda state: state.update({A: state[A].view(2, 10)}))
    edit_config(bad, r=2, rank_pattern={"lin1": 4})
    edit_pickle(bad, lambda state: state.update({B: state[B][:, :2].clone()}))
    compose(tiny.build("mlp"), good, bad)

    content = file.read_bytes()
    place = content.index(values)
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    refuse(tiny.build("mlp"), good, bad, message=f"adapter 'bad': {file} is damaged: the checksum of its record")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_view_that_is_larger_than_what_is_stored(zipped: bool, good: Path, bad: Path) -> None:
    """Some kilobytes of them would fill any memory."""
    edit_pickle(
        bad,
        lambda state: state.update({A: torch.zeros(1).expand(4_000_000, 10)}),
        _use_new_zipfile_serialization=zipped,
    )
    edit_config(bad, r=4_000_000)
    assert (bad / "adapter_model.bin").stat().st_size < 20_000
    message = f"{A!r} has shape (4000000, 10) and dtype torch.float32, 160000000 bytes, but only 4 are stored for it"
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_many_tensors_that_share_their_values(zipped: bool, good: Path, bad: Path) -> None:
    values = torch.rand(100_000)
    edit_pickle(
        bad,
        lambda state: state.update({f"head.{n}": values for n in range(100)}),
        _use_new_zipfile_serialization=zipped,
    )
    refuse(tiny.build("mlp"), good, bad, message="tensors of 40001056 bytes in all share its")


def test_records_that_unpack_to_much_more(good: Path, bad: Path) -> None:
    edit_records(bad, lambda _, content: content, zipfile.ZIP_DEFLATED, **{"data/99": bytes(1 << 24)})
    refuse(tiny.build("mlp"), good, bad, message="bytes unpack to 167")


def test_a_pickle_too_long_to_be_one_of_tensors(good: Path, bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "LARGEST_PICKLE", 10_000)
    edit_records(bad, lambda name, content: content + b"." * 10_000 if name.endswith("data.pkl") else content)
    refuse(tiny.build("mlp"), good, bad, message="adapter_model/data.pkl has 10")


@pytest.mark.filterwarnings("ignore:.*(Sparse|prototype|nested|quantize).*")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda t: t.to_sparse(), "holds a tensor of layout torch.sparse_coo under"),
        (lambda t: t.to_sparse_csr(), "holds a tensor of layout torch.sparse_csr under"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "holds a quantized tensor (torch.qint8) under"),
        (lambda t: torch.nested.nested_tensor([t[0], t[1, :3]]), "holds a nested tensor under"),
        (lambda t: t.to("meta"), "holds no values for"),
    ],
    ids=["sparse", "CSR", "quantized", "nested", "meta"],
)
def test_tensors_of_other_kinds(kind: Callable[[Tensor], Tensor], message: str, good: Path, bad: Path) -> None:
    edit_pickle(bad, lambda state: state.update({A: kind(state[A])}))
    refuse(tiny.build("mlp"), good, bad, message=f"{message} {A!r}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, "one level below, under 'state_dict'"),
        (lambda state: {"step": 3, "model": state}, "'step' is of type int"),
        (lambda state: {**state, "epoch": 3}, "'epoch' is of type int"),
        (lambda state: {**state, 7: torch.ones(2)}, "its key 7 is not a string"),
        (lambda state: {**state, b"x": torch.ones(2)}, "its key b'x' is not a string"),
        (lambda state: list(state.values()), "but a list"),
        (lambda state: state[A], "but a Tensor"),
        (lambda state: {}, "its weights file holds no"),
    ],
    ids=["state_dict", "step and model", "a number", "a number as key", "bytes as key", "list", "tensor", "nothing"],
)
def test_something_else_than_a_state_dict(
    change: Callable[[dict[str, Tensor]], object], message: str, good: Path, bad: Path
) -> None:
    edit_pickle(bad, change)
    refuse(tiny.build("mlp"), good, bad, message=message)


def test_the_error_does_not_advise_to_load_it_unsafely(good: Path, bad: Path) -> None:
    """PyTorch's own text does, in bold."""
    edit_pickle(bad, lambda state: {**state, "args": Path("x")})
    with pytest.raises(ValueError, match="Unsupported global") as caught:
        compose(tiny.build("mlp"), good, bad)
    assert "\x1b" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


# Factors that are no real numbers, in both formats


@pytest.mark.parametrize("in_pickle", [True, False], ids=["pickle", "safetensors"])
@pytest.mark.parametrize("key", [A, B])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.uint16,
        torch.float8_e8m0fnu,
    ],
    ids=str,
)
def test_factors_that_are_no_floating_point_numbers(
    dtype: torch.dtype, key: str, in_pickle: bool, good: Path, bad: Path
) -> None:
    edit_pickle(bad, lambda state: state.update({key: state[key].abs().to(dtype)}))
    if not in_pickle:
        save_file(torch.load(bad / "adapter_model.bin"), bad / "adapter_model.safetensors")
    message = f"module 'lin0': tensor {key!r} has dtype {dtype}; LoRA factors are real floating-point numbers"
    refuse(tiny.build("mlp"), good, bad, message=message)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str
)
def test_factors_of_eight_bits_are_exact(dtype: torch.dtype, bad: Path) -> None:
    edit_pickle(bad, lambda state: {key: t.to(dtype) for key, t in state.items()})
    state = torch.load(bad / "adapter_model.bin")
    reference = reference_of(edit_pickle(bad, lambda state: {key: t.double() for key, t in state.items()}))
    torch.save(state, bad / "adapter_model.bin")
    assert_products(compose(tiny.build("mlp").double(), bad), reference)
    save_file(state, bad / "adapter_model.safetensors")
    assert_products(compose(tiny.build("mlp").double(), bad), reference)
