"""What falls between the parts: names, merging and saving, averages of checkpoints, computed base weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM

from peft_composition import CompositionConfig
from peft_composition.upstream.pickled import UnreadablePickleError, index, load

from .. import tiny


def test_a_lora_cannot_take_the_name_of_a_composition(tmp_path: Path) -> None:
    model = tiny.compose("llama", [str(folder) for folder in tiny.save_pair(tmp_path, "llama")])
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"holds a composition 'default'.*adapter_name=\"fresh\""):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model.peft_config["default"], CompositionConfig)
    assert dict(model.named_parameters()).keys() == before.keys()
    both = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="fresh")
    assert set(both.peft_config) == {"default", "fresh"}
    again = copy.deepcopy(both)
    assert isinstance(again.peft_config["default"], CompositionConfig)


@pytest.mark.parametrize("tied", [True, False])
def test_saving_while_an_output_layer_is_merged_is_refused(tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    lora = str(tiny.save_lora(tmp_path / "a", base, ["q_proj", "lm_head"], seed=1))
    ids = torch.tensor([[1, 5, 9, 33]])
    model = get_peft_model(copy.deepcopy(base), CompositionConfig(adapters=[lora], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        expected = model(ids).logits
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"merged into 'lm_head'.*unmerge_adapter"):
            model.save_pretrained(str(tmp_path / "out"))
        model.unmerge_adapter()
        model.save_pretrained(str(tmp_path / "out"))
        again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-6)


def test_a_mean_of_checkpoints_can_be_set(tmp_path: Path) -> None:
    """Federated averaging takes the weighted mean of every tensor, of the fingerprint, too."""
    adapters = [str(folder) for folder in tiny.save_pair(tmp_path, "bert")]
    model = tiny.compose("bert", adapters)
    state = get_peft_model_state_dict(model)
    third = {key: tensor.double() / 3 for key, tensor in state.items()}
    mean = {key: part + part + part for key, part in third.items()}
    set_peft_model_state_dict(tiny.compose("bert", adapters), {key: tensor.float() for key, tensor in mean.items()})


class Allocation:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return bytearray, (self.nbytes,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_memory_is_not_loaded(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"x": Allocation(1 << 20)}, path, _use_new_zipfile_serialization=zipped, pickle_module=pickle)
    for read in (index, load):
        with pytest.raises(UnreadablePickleError, match="bytearray"):
            read(path)


@pytest.mark.parametrize("kind", ["weight_norm", "pruned"])
def test_merging_into_a_computed_weight_is_refused(kind: str, tmp_path: Path) -> None:
    base = tiny.build("mlp")
    lora = str(tiny.save_lora(tmp_path / "a", base, ["lin0", "lin1"], seed=1))
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(base.get_submodule("lin0"))
    else:
        prune.l1_unstructured(base.get_submodule("lin0"), "weight", 0.5)
    model = get_peft_model(base, CompositionConfig(adapters=[lora])).eval()
    before = tiny.output(model, "mlp")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"lin0.*computed from other tensors"):
            merge()
    torch.testing.assert_close(tiny.output(model, "mlp"), before, rtol=0, atol=0)
