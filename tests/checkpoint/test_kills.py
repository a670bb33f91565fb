"""SIGKILL during saves and exports: what is left is the old state, the new one or an error, never some of each."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from peft_composition.checkpoint.export import to_lora
from peft_composition.drafts import CONFIG_DRAFT, LORA_DRAFT, draft_in

from .. import kills, tiny, warm


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")


@pytest.mark.parametrize("kind", list(kills.SAVES))
def test_a_kill_before_any_change_leaves_no_mixture(kind) -> None:
    outcomes, leftovers = kills.kill(kind, events=True)
    assert outcomes["mixture"] == 0
    assert leftovers == []
    assert outcomes["old"] > 0
    assert outcomes["new"] > 0
    if kind != "save_pretrained after more training":  # which changes one file
        assert any(outcome.startswith("error") for outcome in outcomes), "no kill came between two files"


@pytest.mark.parametrize(
    "kind",
    [
        "save_pretrained over another composition",
        "export with a separate head",
        "add_to_checkpoint with a separate head",
    ],
)
def test_a_kill_at_a_random_moment_leaves_no_mixture(kind) -> None:
    outcomes, leftovers = kills.kill(kind, moments=10)
    assert outcomes["mixture"] == 0
    assert leftovers == []
    assert outcomes.total() == 10


class TestDrafts:
    @pytest.mark.parametrize("prefix", [CONFIG_DRAFT, LORA_DRAFT, ".card-"])
    def test_of_the_dead_are_cleared_away_by_the_next_save(self, prefix, pair, tmp_path) -> None:
        (tmp_path / f"{prefix}dead").mkdir()
        (tmp_path / f"{prefix}dead" / "adapter_model.safetensors").write_bytes(b"some")
        tiny.compose("mlp", pair("mlp")).save_pretrained(str(tmp_path))
        assert not any(name.startswith(".") for name in os.listdir(tmp_path))

    def test_of_the_living_stay(self, tmp_path) -> None:
        """In this process and in another one."""
        context = warm.context()
        ready, done = context.Event(), context.Event()
        process = context.Process(target=_hold_a_draft, args=(str(tmp_path), ready, done))
        process.start()
        assert ready.wait(60)
        with draft_in(tmp_path, LORA_DRAFT) as own:
            with draft_in(tmp_path, CONFIG_DRAFT) as inner:
                others = {path.name for path in tmp_path.iterdir()} - {own.name, inner.name}
            assert len(others) == 1
            assert own.is_dir()
        assert {path.name for path in tmp_path.iterdir()} == others
        process.kill()
        process.join()
        with draft_in(tmp_path, LORA_DRAFT) as own:
            assert [path.name for path in tmp_path.iterdir()] == [own.name]
        assert list(tmp_path.iterdir()) == []

    def test_what_others_named_is_left_alone(self, tmp_path) -> None:
        (tmp_path / ".loras").mkdir()
        (tmp_path / ".lora-notes").write_text("mine")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / ".card-link").symlink_to(tmp_path / "elsewhere")
        with draft_in(tmp_path, LORA_DRAFT):
            pass
        assert sorted(os.listdir(tmp_path)) == [".card-link", ".lora-notes", ".loras", "elsewhere"]


def _hold_a_draft(folder: str, ready: Any, done: Any) -> None:
    with draft_in(Path(folder), LORA_DRAFT):
        ready.set()
        done.wait(60)


class TestTwoAtOnce:
    def test_exports_into_one_folder_end_as_one_of_them(self, tmp_path) -> None:
        """Two processes export again and again: every state that is left when both are done is whole."""
        context = warm.context()
        folder = tmp_path / "lora"
        start = time.time() + 3
        processes = [
            context.Process(target=_export_again_and_again, args=(str(tmp_path), str(folder), seed, start))
            for seed in (1, 2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        found = kills._lora_in(folder)
        wanted = []
        for seed, fields in _EXPORTS.items():
            to_lora(kills._composed(tmp_path, seed), **fields).save_pretrained(tmp_path / f"only {seed}")
            wanted.append(kills._lora_in(tmp_path / f"only {seed}"))
        assert any(kills._equal(found, one) for one in wanted)

    def test_a_save_into_which_another_wrote_is_an_error(self, pair, tmp_path) -> None:
        """The config of one beside the weights of another: who saves last is told, and so is who loads."""
        model, other = tiny.compose("mlp", pair("mlp")), tiny.compose("mlp", pair("mlp"), gain=7)
        other.save_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match="do not belong together"):
            model.peft_config["default"].save_pretrained(str(tmp_path), auto_mapping_dict=None)  # PEFT's last step
        with pytest.raises(ValueError, match="do not belong together"):
            PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path))

    def test_a_pickle_takes_the_place_of_older_safetensors(self, pair, tmp_path) -> None:
        """PEFT prefers safetensors, and would load the weights of the save before."""
        tiny.compose("mlp", pair("mlp")).save_pretrained(str(tmp_path))
        model = kills._scrambled(tiny.compose("mlp", pair("mlp")), 5)
        time.sleep(0.02)
        model.save_pretrained(str(tmp_path), safe_serialization=False)
        loaded = PeftModel.from_pretrained(tiny.build("mlp"), str(tmp_path))
        assert kills._equal([tiny.output(loaded, "mlp")], [tiny.output(model, "mlp")])


_EXPORTS: dict[int, dict[str, Any]] = {1: {"include_head": "separate"}, 2: {"rank": 1, "include_head": "separate"}}


def _export_again_and_again(scratch: str, folder: str, seed: int, start: float) -> None:
    export = to_lora(kills._composed(Path(scratch), seed), **_EXPORTS[seed])
    time.sleep(max(0.0, start - time.time()))
    for _ in range(60):
        export.save_pretrained(folder)
