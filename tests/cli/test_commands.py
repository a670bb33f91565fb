"""The command line: typer's runner for most, real processes where the process itself matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import peft_composition
import peft_composition_cli
from peft_composition import CompositionConfig
from peft_composition.given_weights import SUM_TOLERANCE
from peft_composition_cli import app

from .. import tiny, warm
from ..checkpoint.test_card import trained
from ..hub_server import HubServer, as_the_hub
from ..upstream.test_hub import files_of


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def run(*args: object) -> Result:
    """Run the command in this process, in a terminal so wide that no cell is broken."""
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, [*map(str, args)])


def run_json(*args: object, code: int = 0) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def run_process(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "COLUMNS": "400", "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head and a tokenizer, as one that was downloaded."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tiny.build("bert").save_pretrained(folder)  # type: ignore[operator]
    from tokenizers import Tokenizer, models

    vocabulary = {"[UNK]": 0, "hello": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> list[Path]:
    """Two LoRAs for it, of different rank, scale and targets."""
    folder, base = tmp_path_factory.mktemp("loras"), load_base(base_folder)
    return [
        tiny.save_lora(folder / "a", base, ["query", "value"], seed=1, r=2, lora_alpha=8, task_type="SEQ_CLS"),
        tiny.save_lora(folder / "b", base, ["value"], seed=2, r=3, lora_alpha=6, task_type="SEQ_CLS"),
    ]


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, loras: list[Path]) -> Path:
    """A composition as if it had been trained: every module has weights of its own."""
    model = trained([str(lora) for lora in loras], base=load_base(base_folder))
    folder = tmp_path_factory.mktemp("composed") / "mix"
    model.save_pretrained(str(folder))
    return folder


def load_base(folder: Path) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


# inspect


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def ten_adapters(folder: Path, base: nn.Module, hub: HubServer) -> list[tuple[str, str | None]]:
    """Ten adapters, each with a part of the reason why it cannot be composed; None where it can."""

    def make(name: str, targets: list[str] | None = None, **lora: Any) -> Path:
        return tiny.save_lora(folder / name, base, targets or ["query"], task_type="SEQ_CLS", **lora)

    good = make("good", r=4)
    wrong = edit(make("wrong-base"), base_model_name_or_path="org/another-model")
    dora = make("dora", use_dora=True)
    missing = make("missing-file")
    (missing / WEIGHTS).unlink()
    other_rank = make("other-rank", r=7)
    other_targets = make("other-targets", ["intermediate.dense"])
    pickled = make("pickle-only")
    torch.save(load_file(pickled / WEIGHTS), pickled / "adapter_model.bin")
    (pickled / WEIGHTS).unlink()
    corrupt = make("corrupt")
    (corrupt / WEIGHTS).write_bytes((corrupt / WEIGHTS).read_bytes()[:100])
    nan = make("nan")
    tensors = load_file(nan / WEIGHTS)
    next(tensor for key, tensor in tensors.items() if "lora_B" in key)[0, 0] = float("nan")
    save_file(tensors, nan / WEIGHTS)
    nothing = folder / "not-an-adapter"
    nothing.mkdir()
    (nothing / "notes.txt").write_text("nothing")
    hub.push("me/private", files_of(good), private=True)
    return [
        (str(wrong), "org/another-model"),
        (str(dora), "DoRA"),
        (str(missing), f"neither {WEIGHTS}"),
        (str(other_rank), None),
        (str(other_targets), None),
        (str(pickled), None),
        (str(corrupt), "not a readable safetensors file"),
        (str(nan), "1 of 64 values are NaN or infinite"),
        ("me/private", "for a private one, log in"),
        (str(nothing), f"it has no {CONFIG}"),
    ]


def test_inspect_gives_a_row_and_a_reason_for_each_of_ten_adapters(tmp_path: Path, hub: HubServer) -> None:
    base = tiny.build("bert")
    base.config._name_or_path = base.name_or_path = "org/tiny-bert"
    base.save_pretrained(tmp_path / "tiny-bert")  # type: ignore[operator]
    hub.push("org/tiny-bert", files_of(tmp_path / "tiny-bert"))
    expected = ten_adapters(tmp_path, base, hub)
    adapters = [adapter for adapter, _ in expected]
    with as_the_hub(hub, tmp_path / "cache"):
        result = run("inspect", *adapters, "--base", "org/tiny-bert", "--json")
    assert result.exit_code == 1, result.stderr
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    rows = json.loads(result.stdout)["adapters"]
    assert [row["path"] for row in rows] == adapters
    for row, (_, reason) in zip(rows, expected):
        assert row["composable"] is (reason is None), row
        assert reason is None or reason in row["reason"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["other-rank"]["ranks"] == [7, 7]
    assert by_name["other-targets"]["targets"] == ["dense"]
    assert by_name["wrong-base"]["base"] == "org/another-model"
    # LoRA of 2 blocks: A (7, 16) and B (16, 7) each.
    assert by_name["other-rank"]["parameters"] == 2 * 7 * (16 + 16)

    # Without a base model, the same adapters against each other, as a table; offline nobody asks for the private one.
    table = run("inspect", *adapters)
    assert table.exit_code == 1
    assert "3 of 10 can be composed." in table.stdout
    for name in by_name:
        assert name in table.stdout
    assert "but most others on 'org/tiny-bert'" in table.stdout


def test_inspect_of_adapters_that_fit_succeeds(loras: list[Path], base_folder: Path) -> None:
    rows = run_json("inspect", *loras, "--base", base_folder)["adapters"]
    assert [(row["name"], row["modules"], row["ranks"]) for row in rows] == [("a", 4, [2, 2]), ("b", 2, [3, 3])]
    assert all("classifier" in " ".join(row["notes"]) for row in rows)


def test_inspect_says_once_what_is_named_twice(loras: list[Path]) -> None:
    rows = run_json("inspect", *loras, loras[0])["adapters"]
    assert [row["name"] for row in rows] == ["a", "b"]


def test_inspect_finds_shapes_that_differ(tmp_path: Path, loras: list[Path], base_folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    wide = transformers.BertForSequenceClassification(config)
    other = tiny.save_lora(tmp_path / "wide", wide, ["value"], task_type="SEQ_CLS")
    among = run_json("inspect", *loras, other, code=1)["adapters"]
    assert [row["composable"] for row in among] == [True, True, False]
    assert "a layer from 32 to 32, but a layer from 16 to 16 in 'a'" in among[2]["reason"]
    against = run_json("inspect", other, "--base", base_folder, code=1)["adapters"]
    assert "lora_A.weight has shape (4, 32), but Linear in the model needs (4, 16)" in against[0]["reason"]


# compose


def test_compose_saves_what_python_composes(tmp_path: Path, loras: list[Path], base_folder: Path) -> None:
    out = tmp_path / "out"
    weights = ["--mixing", "fixed", "--weights", "0.3,0.7"]
    result = run("compose", "--base", base_folder, "--adapters", *loras, *weights, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "a 0.3, b 0.7" in result.stdout
    by_hand = tiny.composed_by_hand(load_base(base_folder), [str(lora) for lora in loras], [0.3, 0.7])
    wanted = tiny.output(by_hand, "bert")
    config = CompositionConfig(adapters=[*loras], mixing="fixed", weights=[0.3, 0.7], task_type="SEQ_CLS")
    for model in (
        PeftModel.from_pretrained(load_base(base_folder), str(out)),
        PeftModel.from_pretrained(load_base(base_folder), str(out), subfolder="lora"),
        get_peft_model(load_base(base_folder), config),
    ):
        torch.testing.assert_close(tiny.output(model.eval(), "bert"), wanted, **TOLERANCE)
    assert 'subfolder="lora"' in (out / "README.md").read_text()


def test_compose_uniform_and_light(tmp_path: Path, loras: list[Path], base_folder: Path) -> None:
    out = tmp_path / "light"
    told = run_json("compose", "--base", base_folder, "--adapters", *loras, "--out", out, "--no-save-adapters")
    assert told["weights"] == {"a": 0.5, "b": 0.5}
    assert told["lora"] is None
    assert not (out / "lora").exists()
    assert not any("factors" in key for key in load_file(out / WEIGHTS))


def test_compose_with_free_weights(tmp_path: Path, loras: list[Path], base_folder: Path) -> None:
    told = run_json(
        "compose", "--base", base_folder, "--adapters", loras[0], "--adapters", loras[1], "--mixing", "fixed",
        "--weights", "1.5,-0.25", "--normalization", "none", "--out", tmp_path / "free",
    )  # fmt: skip
    assert told["weights"] == {"a": 1.5, "b": -0.25}


def test_an_adapter_that_cannot_be_composed_is_one_line_and_leaves_nothing(tmp_path: Path, base_folder: Path) -> None:
    dora = tiny.save_lora(tmp_path / "dora", load_base(base_folder), ["query"], use_dora=True)
    result = run("compose", "--base", base_folder, "--adapters", dora, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("Error: adapter 'dora': it is a DoRA adapter")
    assert not (tmp_path / "out").exists()


def test_compose_pushes_with_the_export(tmp_path: Path, hub: HubServer, loras: list[Path], base_folder: Path) -> None:
    with as_the_hub(hub, tmp_path / "cache", hub.token):
        result = run(
            "compose", "--base", base_folder, "--adapters", *loras, "--out", tmp_path / "out", "--push", "me/mix",
            "--json",
        )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    repository = hub.repositories["me/mix"]
    files = repository.commits[repository.refs["main"]]
    assert {CONFIG, WEIGHTS, "README.md", f"lora/{CONFIG}", f"lora/{WEIGHTS}"} <= set(files)
    assert 'PeftModel.from_pretrained(base_model, "me/mix", subfolder="lora")' in files["README.md"].decode()
    assert repository.refs["main"] in json.loads(result.stdout)["commit"]
    assert files[f"lora/{WEIGHTS}"] == (tmp_path / "out" / "lora" / WEIGHTS).read_bytes()


# export, weights, merge


def test_export_is_read_by_stock_peft(tmp_path: Path, composed: Path, base_folder: Path) -> None:
    wanted = tiny.output(PeftModel.from_pretrained(load_base(base_folder), str(composed)).eval(), "bert")
    exact = run("export", composed, "--out", tmp_path / "exact")
    assert exact.exit_code == 0
    assert "exact" in exact.stdout
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "exact").eval()
    assert model.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(tiny.output(model, "bert"), wanted, **TOLERANCE)

    cut = run_json(
        "export", composed, "--rank", 1, "--head", "without", "--dtype", "bfloat16", "--out", tmp_path / "1"
    )
    assert set(cut["ranks"].values()) == {1}
    assert all(0 < error < 1 for error in cut["errors"].values())
    tensors = load_file(tmp_path / "1" / WEIGHTS)
    assert all(".lora_" in key and tensor.dtype == torch.bfloat16 for key, tensor in tensors.items())
    own = run_json("export", composed, "--energy", 0.9, "--own-ranks", "--out", tmp_path / "own")
    one = run_json("export", composed, "--energy", 0.9, "--out", tmp_path / "one")
    assert set(one["ranks"].values()) == {max(own["ranks"].values())}
    both = run("export", composed, "--round-rank", "--own-ranks", "--out", tmp_path / "both")
    assert both.exit_code == 2
    assert "not both" in both.output
    table = run("export", composed, "--rank", 1, "--out", tmp_path / "2").stdout
    assert f"{cut['total_error']:.2g}" in table
    assert all(module in table for module in cut["errors"])


def test_weights_are_those_of_the_model(tmp_path: Path, composed: Path, base_folder: Path) -> None:
    model = PeftModel.from_pretrained(load_base(base_folder), str(composed))
    png = tmp_path / "plots" / "weights.png"
    told = run_json("weights", composed, "--png", png, "--by", "module")
    wanted = model.mixing_weights()
    assert list(told["mixing_weights"]) == list(wanted)
    for module, row in told["mixing_weights"].items():
        assert row == pytest.approx({name: wanted[module][name] for name in row}, abs=1e-6)
        assert ("b" in row) is module.endswith("value")
    assert png.read_bytes().startswith(b"\x89PNG")
    before = png.read_bytes()
    assert f"Heatmap: {png}" in run("weights", composed, "--png", png, "--by", "module").stdout
    assert png.read_bytes() == before
    text = run("weights", composed).stdout
    mean = sum(row["a"] for row in wanted.values()) / len(wanted)
    assert f"{mean:.3f}" in text
    assert "bert.encoder.layer.1" in text


def test_weights_draws_nothing_unless_asked(tmp_path: Path, composed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.png").write_text("mine")
    assert run("weights", composed).exit_code == 0
    assert run_json("weights", composed)["png"] is None
    assert (tmp_path / "weights.png").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.png"]


def test_without_matplotlib_the_tables_are_there(tmp_path: Path, composed: Path) -> None:
    """Also where a heatmap is asked for that cannot be drawn."""
    code = (
        f"import json, sys; {warm.without('matplotlib')}\n"
        "from typer.testing import CliRunner; from peft_composition_cli import app\n"
        "results = [CliRunner().invoke(app, arguments) for arguments in json.loads(sys.argv[1])]\n"
        "print(json.dumps([(result.exit_code, result.stdout, result.stderr) for result in results]))"
    )
    weights = ["weights", str(composed)]
    done = warm.run("-c", code, json.dumps([weights, [*weights, "--png", str(tmp_path / "heat.png")]]))
    assert done.returncode == 0, done.stderr
    for (found, output, error), exit_code in zip(json.loads(done.stdout), (0, 1), strict=True):
        assert found == exit_code, error
        assert "Mean weight by block" in output
        assert ("pip install 'peft-composition[cli]'" in error) is (exit_code == 1)


def test_merge_writes_a_plain_model_with_its_tokenizer(tmp_path: Path, composed: Path, base_folder: Path) -> None:
    wanted = tiny.output(PeftModel.from_pretrained(load_base(base_folder), str(composed)).eval(), "bert")
    told = run_json("merge", composed, "--out", tmp_path / "merged")
    assert (told["model"], told["dtype"], told["processor"]) == ("BertForSequenceClassification", "float32", True)
    plain = load_base(tmp_path / "merged")
    torch.testing.assert_close(tiny.output(plain, "bert"), wanted, **TOLERANCE)
    assert not (tmp_path / "merged" / CONFIG).exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("hello") == 1

    half = run_json("merge", composed, "--out", tmp_path / "half", "--base", base_folder, "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16"


def test_merge_of_an_image_model_can_be_used_as_it_is(tmp_path: Path) -> None:
    from PIL import Image

    base = tiny.build("vit")
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    size = base.config.image_size  # type: ignore[union-attr]
    processor = transformers.ViTImageProcessor(size={"height": size, "width": size})
    processor.save_pretrained(tmp_path / "base")
    adapters = tiny.save_pair(tmp_path, "vit")
    run_json("compose", "--base", tmp_path / "base", "--adapters", *adapters, "--out", tmp_path / "mix")
    told = run_json("merge", tmp_path / "mix", "--out", tmp_path / "merged")
    assert told["processor"]
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "merged"))
    image = Image.new("RGB", (size, size), (200, 30, 90))
    composed = PeftModel.from_pretrained(
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "mix"
    )
    with torch.no_grad():
        wanted = composed(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    found = {entry["label"]: entry["score"] for entry in classify(image, top_k=100)}
    labels = composed.config.id2label
    assert [found[labels[n]] for n in range(len(labels))] == pytest.approx(wanted.tolist(), abs=1e-5)


# Arguments and the process


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["compose", "--mixing", "fixed", "--weights", "1"], "--mixing fixed needs 2 numbers in --weights, got 1."),
        (["compose", "--weights", "0.5,0.5"], "--mixing uniform ignores --weights"),
        (["compose", "--mixing", "learned"], "learned"),
        (["compose", "--weights"], "--weights"),
        (["compose", "--weights", "0.5,half"], "Invalid value for '--weights': 'half' is not a number"),
        (["compose", "--weights", "0.4", "0.6"], "'0.6' is not an adapter; separate numbers with commas"),
        (["compose", "--weights=0.4,"], "'' is not a number; separate numbers with commas and no spaces"),
        (["compose", "--mixing", "none"], "Invalid value for '--mixing': 'none' is not one of"),
        (["compose", "--mixing", "fixed", "--weights", "0.5,nan"], "must be finite numbers, got 0.5,nan"),
        (["compose", "--mixing", "fixed", "--weights", "1.5,-0.5"], "must not be negative, got 1.5,-0.5"),
        (["compose", "--mixing", "fixed", "--weights", "0.5,0.6"], "must sum to 1 or less, got 1.1"),
        (["compose", "--task", "SOMETHING"], "SOMETHING"),
        (["compose", "--num-labels", "0"], "--num-labels"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    command, *options = arguments
    result = run(command, "--base", "b", "--adapters", "x", "y", "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--energy", "1.5"], "must be more than 0 and at most 1, got 1.5"),
        (["--energy", "0"], "must be more than 0 and at most 1, got 0"),
        (["--energy", "nan"], "must be more than 0 and at most 1, got nan"),
        (["--rank", "0"], "--rank"),
        (["--rank", "2", "--energy", "0.5"], "not both"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_wrong_arguments_of_an_export_are_refused(
    arguments: list[str], complaint: str, composed: Path, tmp_path: Path
) -> None:
    result = run("export", composed, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.replace("│", "").split())


def test_weights_are_refused_and_taken_as_the_config_does() -> None:
    """The command line knows the rule by itself, because the config comes with torch."""
    assert peft_composition_cli.compose.SUM_TOLERANCE == SUM_TOLERANCE
    weights = ["--mixing", "fixed", "--weights", "0.501,0.5"]
    result = run("compose", "--base", "b", "--adapters", "x", "y", *weights, "--out", "o", "--json")
    assert result.exit_code == 1
    assert "weights" not in result.stderr


def test_a_folder_that_holds_something_is_not_written_to(composed: Path) -> None:
    before = files_of(composed)
    for command in ("export", "merge"):
        result = run(command, composed, "--out", composed)
        assert result.exit_code == 2
        assert "is not empty" in result.stderr
    assert files_of(composed) == before


def test_a_folder_without_a_composition_is_refused(tmp_path: Path, loras: list[Path]) -> None:
    for command in (["export", "--out", tmp_path / "o"], ["weights"], ["merge", "--out", tmp_path / "o"]):
        result = run(command[0], loras[0], *command[1:])
        assert result.exit_code == 1, result.output
        assert f"{loras[0]} is not a saved composition: it is a plain LoRA" in result.stderr
        (tmp_path / "empty").mkdir(exist_ok=True)
        result = run(command[0], tmp_path / "empty", *command[1:])
        assert result.exit_code == 1, result.output
        assert "empty is not a saved composition: it has no adapter_config.json" in result.stderr


def test_of_the_export_beside_a_composition_the_composition_is_named(
    tmp_path: Path, loras: list[Path], base_folder: Path
) -> None:
    run_json("compose", "--base", base_folder, "--adapters", *loras, "--out", tmp_path / "mix")
    result = run("weights", tmp_path / "mix" / "lora")
    assert f"it is a plain LoRA; the composition beside it is {tmp_path / 'mix'}" in result.stderr
    (tmp_path / "mix" / WEIGHTS).unlink()
    for command in (["weights"], ["export", "--out", tmp_path / "o"], ["merge", "--out", tmp_path / "o"]):
        result = run(command[0], tmp_path / "mix", *command[1:])
        assert result.exit_code == 1, result.output
        expected = f"Error: {tmp_path / 'mix'} is not a saved composition: its weights are missing, it has neither"
        assert result.stderr.splitlines()[-1].startswith(expected), result.stderr


def test_a_push_that_fails_says_what_is_there(tmp_path: Path, loras: list[Path], base_folder: Path) -> None:
    """Offline, as all tests."""
    out = tmp_path / "out"
    options = ("--base", base_folder, "--adapters", *loras, "--out", out, "--no-lora", "--push", "me/mix")
    result = run("compose", *options)
    assert result.exit_code == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith(f"Error: {out} was saved completely, but pushing it to me/mix failed: ")
    assert 'call peft_composition.push_to_hub(model, "me/mix", lora=False)' in error
    assert run("weights", out).exit_code == 0


@pytest.mark.parametrize("name", ["w.txt", "w", "png"])
def test_a_heatmap_with_another_suffix_is_refused_at_once(composed: Path, tmp_path: Path, name: str) -> None:
    result = run("weights", composed, "--png", tmp_path / name)
    assert result.exit_code == 2
    assert f"{name} must end with one of .png, .pdf" in result.stderr
    assert result.stdout == ""


def test_every_suffix_of_a_heatmap_is_one_of_matplotlib() -> None:
    suffixes = {f".{name}" for name in FigureCanvasAgg.get_supported_filetypes()}
    assert set(peft_composition_cli.weights.HEATMAP_SUFFIXES) <= suffixes


def test_what_needs_no_torch_loads_none(composed: Path) -> None:
    code = (
        "import sys; sys.argv = ['peft-composition', *sys.argv[1:]]; from peft_composition_cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'peft' not in sys.modules"
    )
    compose = ["compose", "--base", "b", "--out", "o", "--adapters", "x", "y"]
    for arguments, exit_code, wanted in (
        (["--help"], 0, "inspect"),
        (["compose", "--help"], 0, "ADAPTER..."),
        (["--version"], 0, f"peft-composition {peft_composition.__version__} (peft {peft.__version__}, transformers "),
        ([*compose, "--mixing", "fixed", "--weights", "1,2"], 2, "must sum to 1 or less, got 3"),
        (["export", str(composed), "--out", "o", "--energy", "2"], 2, "at most 1, got 2"),
    ):
        result = run_process("-c", code, *arguments)
        assert result.returncode == exit_code, result.stderr
        assert wanted in result.stdout + result.stderr
    completion = run_process("-c", code, _PEFT_COMPOSITION_COMPLETE="complete_bash", COMP_WORDS="peft-composition in",
                             COMP_CWORD="1")  # fmt: skip
    assert completion.stdout.split() == ["inspect"], completion.stderr
