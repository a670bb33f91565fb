"""`CompositionConfig`: which adapters are mixed and how, and the record that a checkpoint needs for loading."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType

from .as_built import DEFINING, AsBuilt
from .drafts import CONFIG_DRAFT, draft_in, take_place
from .given_weights import checked_weights
from .public import without_local_paths
from .record import require_valid_record, summary
from .references import AdapterReference, LoraLayout, Provenance, named_references
from .scalars import LARGEST_FLOAT32, SMALLEST_FLOAT32, as_float, as_text
from .selection import layer_indices, layer_lists, names_or_expression, saved_modules, with_head
from .text import shown
from .version import __version__


MIXINGS = ("learned", "uniform", "fixed")
NORMALIZATIONS = ("softmax", "none")
SHARINGS = ("module", "block", "model")
DEFAULT_GAIN = {"softmax": 40.0, "none": 10.0}


@dataclass
class CompositionConfig(PeftConfig):
    """Configuration of a composition: N trained LoRA adapters mixed, module by module, into one adapter.

    `W = W0 + sum_n w_n s_n B_n A_n` for every target module (arXiv 2402.15414, section 4).

    Args:
        adapters: the upstream LoRA adapters. Each is a Hub id, a local folder (`str` or `Path`), or a dict with
            `path` and optionally `revision`, `subfolder`, `name` and `local_files_only`. Required.
        mixing: `"learned"` (default; one trainable vector per module, starts at the uniform composition),
            `"uniform"` (1/N, nothing trainable) or `"fixed"` (`weights`, nothing trainable).
        weights: one weight per adapter: the weights for `"fixed"`, or the start for `"learned"`. Default: 1/N each.
            With `normalization="softmax"` they must be non-negative with a sum of at most 1. If the sum is below 1,
            the rest is the base model's share, like an adapter without an update; if weights are learned, this share
            changes with them. A learned weight that starts at zero stays zero.
        normalization: `"softmax"` (default; weights are positive and sum to 1) or `"none"` (free weights, which may be
            negative).
        gain: factor inside the mixing logits, `v = v0 + gain * theta`, where theta is trained. Adam changes theta by
            about the learning rate per step, so the gain decides how far the weights move in a few-shot run.
            Default: 40 for `"softmax"`, 10 for `"none"`.
        weight_sharing: one weight vector per `"module"` (default, as in the paper), per `"block"` (shared by the
            modules of a transformer block) or per `"model"`.
        target_modules: the modules to compose, as in PEFT a list of names, a regex or `"all-linear"`. Parameters that
            adapters target directly (PEFT's `target_parameters`) are selected by their own names or those of their
            modules. Default: everything that any upstream adapter touches.
        exclude_modules: the modules to leave out, as in PEFT names or a regex. Default: none.
        layers_to_transform: as in PEFT, the indices of the layers to compose. Default: all.
        layers_pattern: as in PEFT, the name of the module list that `layers_to_transform` counts in.
        modules_to_save: as in PEFT, modules that are trained in full and saved, such as the new task's head. Default:
            PEFT's default for the task type.
        save_adapters: whether a checkpoint contains the upstream factors and needs no other files (default), or only
            their names, commits and hashes, so that loading downloads them again.
        check_base_model: whether to refuse adapters whose config names another base model on the Hub (default: True).
            Copies of the same weights, such as `org/model-bnb-4bit`, are accepted with a warning. With False, names
            are ignored; modules and shapes are always compared.
        composed_modules: record, written when the composition is built: for each composed module, by its full name,
            the rank of every adapter (0 if it does not touch the module). Not for users.
        biased_modules: record: the composed modules where an adapter has a LoRA bias. Not for users.
        layer_sizes: record: out, in (and kernel) of every composed module in the base model. Not for users.
        lora_layout: record: properties of the base model that an export to a plain LoRA needs. Not for users.
        provenance: record: name, path, commit, sha256, base model and license of every upstream adapter. Not for
            users.
        num_labels: record: number of classes of the base model's head, for classifiers. Not for users.
        class_names: record: names of the head's classes by number, if the base model's config has them. Not for users.
        untrained_head: record: hash of a head that was saved untrained; after training, the head has another hash.
            Not for users.
        peft_composition_version: record: the version of this package that built the composition. Not for users.

    Raises:
        ValueError: a field has an invalid value; the message names the field and the value.
    """

    # Callbacks of modules that build on this class, for when a config is read from a folder or written to one.
    when_loaded: ClassVar[tuple[Callable[[Path, CompositionConfig], None], ...]] = ()
    when_saved: ClassVar[tuple[Callable[[Path], None], ...]] = ()

    adapters: list[str | Path | AdapterReference] | None = field(
        default=None, metadata={"help": "The upstream LoRA adapters: Hub ids, local folders or dicts."}
    )
    mixing: Literal["learned", "uniform", "fixed"] = field(
        default="learned", metadata={"help": "Whether the mixing weights are learned, uniform or fixed."}
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "The fixed weights, or the start of the learned ones. Default: 1/N each."}
    )
    normalization: Literal["softmax", "none"] = field(
        default="softmax", metadata={"help": "softmax: weights are positive and sum to 1. none: free weights."}
    )
    gain: float | None = field(default=None, metadata={"help": "Factor inside the mixing logits."})
    weight_sharing: Literal["module", "block", "model"] = field(
        default="module", metadata={"help": "Which modules share one weight vector."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to compose. Default: all that the adapters touch."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, names or a regex."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to compose. Default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved, such as the new task's head."}
    )
    save_adapters: bool = field(default=True, metadata={"help": "Whether checkpoints contain the upstream factors."})
    check_base_model: bool = field(
        default=True, metadata={"help": "Whether to refuse adapters that name another base model."}
    )
    composed_modules: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Record: ranks of every adapter, by module."}
    )
    biased_modules: list[str] | None = field(
        default=None, metadata={"help": "Record: modules where an adapter has a bias."}
    )
    layer_sizes: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Record: sizes of the composed modules in the base model."}
    )
    provenance: list[Provenance] | None = field(
        default=None, metadata={"help": "Record: origin, hash and license of every upstream adapter."}
    )
    lora_layout: LoraLayout | None = field(
        default=None, metadata={"help": "Record: properties of the base model that an export needs."}
    )
    num_labels: int | None = field(
        default=None, metadata={"help": "Record: number of classes of the base model's head."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Record: names of the head's classes, by number."}
    )
    untrained_head: str | None = field(
        default=None, metadata={"help": "Record: hash of a head that was saved untrained."}
    )
    peft_composition_version: str | None = field(
        default=None, metadata={"help": "Record: the version of this package that built the composition."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("COMPOSITION")
        self._filled_in_gain: float | None = None
        self._known_weights: list[float] | None = None
        self._check()
        if self.peft_composition_version is None:
            self.peft_composition_version = __version__
        self._read_from_checkpoint = self.composed_modules is not None
        self._is_built = self._is_building = False
        self._as_built: AsBuilt | None = None
        self._request = self.target_modules
        self._as_loaded = self._definition() if self._read_from_checkpoint else None
        self.summary_as_read: dict[str, Any] | None = None
        self.names_in_model: list[str] | None = None  # of classes, in its config when last looked at
        if self._read_from_checkpoint:
            require_valid_record(self)
            self.summary_as_read = json.loads(json.dumps(summary(self)))  # far faster than a deep copy

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; fields that define the composition can no longer change once a model was built from them."""
        state = self.__dict__
        if name in DEFINING and state.get("_is_built") and not state["_is_building"]:
            known = self.requested_target_modules if name == "target_modules" else state[name]
            if type(value) is type(known) and value == known:
                return
            raise ValueError(
                f"{name} cannot become {as_text(value)}: a model was built with {as_text(known)} and keeps using it. "
                "Build another model from a new config: dataclasses.replace(config, "
                f"composed_modules=None, {name}=...)"
            )
        super().__setattr__(name, value)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Context in which a model is built from this config; building replaces `target_modules` by the modules found.

        Raises:
            ValueError: a field has an invalid value, or differs from the saved composition that this config was
                loaded with.
        """
        self._is_building = True
        try:
            self._check()
            if self._as_loaded is not None and self.is_restored:
                for name, now in self._definition().items():
                    if now != self._as_loaded[name]:
                        raise ValueError(
                            f"{name} is {as_text(now)}, but the saved composition that this config describes has "
                            f"{as_text(self._as_loaded[name])}. To build a new composition of the adapters, use "
                            "dataclasses.replace(config, composed_modules=None)"
                        )
            self._request = self.requested_target_modules
            yield
            self._is_built, self._as_built = True, AsBuilt(self)
        finally:
            if not self._is_built:
                self.target_modules = self._request
            self._is_building = False

    @property
    def requested_target_modules(self) -> list[str] | set[str] | str | None:
        """`target_modules` as given by the user, even after building has replaced them."""
        return self._request if self._is_built else self.target_modules

    def _definition(self) -> dict[str, Any]:
        """The fields that a saved composition is computed from; adapters by name, because folders may move."""
        replaced = {"adapters": self.adapter_names, "target_modules": copy.copy(self.requested_target_modules)}
        fields = {name: copy.deepcopy(getattr(self, name)) for name in DEFINING if name not in replaced}
        return {**fields, **replaced}

    def _check(self) -> None:
        """Complete and check the fields; repeated before a model is built, because fields can be set."""
        self.adapters = named_references(self.adapters)
        _require("mixing", self.mixing, MIXINGS)
        _require("normalization", self.normalization, NORMALIZATIONS)
        _require("weight_sharing", self.weight_sharing, SHARINGS)
        for name in ("save_adapters", "check_base_model"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        self.target_modules = names_or_expression("target_modules", self.target_modules)
        self.exclude_modules = names_or_expression("exclude_modules", self.exclude_modules)
        self.layers_to_transform = layer_indices("layers_to_transform", self.layers_to_transform)
        self.layers_pattern = layer_lists("layers_pattern", self.layers_pattern)
        self.modules_to_save = saved_modules("modules_to_save", self.modules_to_save)
        weights = self._checked_weights()  # the sum of weights that it returned before may be off by one bit
        if weights is None or not isinstance(self.weights, list) or self.weights != self._known_weights:
            self.weights = self._known_weights = weights
        if self.gain is None or self.gain == self._filled_in_gain:
            self.gain = self._filled_in_gain = DEFAULT_GAIN[self.normalization]
        gain = as_float(self.gain)
        if gain is None or not SMALLEST_FLOAT32 <= gain <= LARGEST_FLOAT32:
            raise ValueError(
                f"gain must be a positive number in the range of float32 ({SMALLEST_FLOAT32:.2g} to "
                f"{LARGEST_FLOAT32:.2g}), got {as_text(self.gain)}"
            )
        self.gain = gain
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names (or None), not as a regex")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform; set both or neither")

    @property
    def adapter_names(self) -> list[str]:
        """The names of the upstream adapters, in the order of the mixing weights."""
        return [reference["name"] for reference in self.references]

    @property
    def references(self) -> list[AdapterReference]:
        """The upstream adapters as dicts with `path`, `name`, `revision` and `subfolder`."""
        adapters = self.adapters
        if not adapters or not all(isinstance(entry, dict) and "name" in entry for entry in adapters):
            return named_references(adapters)  # they were set after the check
        return adapters  # type: ignore[return-value]

    @property
    def is_restored(self) -> bool:
        """Whether this config was loaded with the record of a built composition, and so describes a checkpoint.

        False for a config that recorded its modules while a model was built from it: it can be used for another
        model.
        """
        return self._read_from_checkpoint and self.composed_modules is not None

    def record(
        self, composed_modules: dict[str, list[int]], biased_modules: list[str], provenance: list[Provenance]
    ) -> None:
        """Record what was composed, for the checkpoint."""
        self.composed_modules = composed_modules
        self.biased_modules = biased_modules
        self.provenance = provenance

    def follow(self, weights: list[float]) -> None:
        """Record weights that a built model was given later, for its checkpoint.

        Raises:
            ValueError: the weights are invalid for this composition, which stays unchanged.
        """
        self.undo_edits()
        own, before = self.__dict__, self.weights
        try:
            own["weights"] = weights
            own["weights"] = own["_known_weights"] = self._checked_weights()
        except ValueError:
            own["weights"] = before
            raise
        if self._as_loaded is not None:
            self._as_loaded["weights"] = own["weights"]
        self._as_built = AsBuilt(self)

    def become(self, other: Self) -> None:
        """Take over the fields and the record of another config, because the built model was changed accordingly."""
        other._read_from_checkpoint, other.names_in_model = self._read_from_checkpoint, self.names_in_model
        if not self._read_from_checkpoint:
            other._as_loaded = other.summary_as_read = None
        with other.building():
            other.target_modules = list(other.composed_modules or ())
        vars(self).update(vars(other))

    def copy(self) -> Self:
        """A config of its own for one model, also where a user has built others from this object."""
        twin = copy.copy(self)
        vars(twin).update(pickle.loads(pickle.dumps(vars(self))))  # faster than a deep copy
        twin.modules_to_save = with_head(self.task_type, twin.modules_to_save)
        return twin

    def undo_edits(self) -> None:
        """Undo edits that were made in place after a model was built from this config, with a warning."""
        if self._as_built is not None and not self._is_building:
            self._as_built.restore(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, as they are saved, with `target_modules` as given by the user."""
        self.undo_edits()
        saved = None if self.modules_to_save is None else [*dict.fromkeys(self.modules_to_save)]  # as PEFT extends it
        return {**super().to_dict(), "target_modules": self.requested_target_modules, "modules_to_save": saved}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read `adapter_config.json`; in a local folder, check that it belongs to the weights beside it.

        Args:
            pretrained_model_name_or_path: a local folder or a Hub id.
            subfolder: the folder of the config in it. Default: its root.
            **kwargs: passed to PEFT's `from_pretrained`.

        Raises:
            ValueError: the record is damaged, or belongs to other weights.
        """
        config = super().from_pretrained(os.fspath(pretrained_model_name_or_path), subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if isinstance(config, CompositionConfig) and config.is_restored and (folder / CONFIG_NAME).is_file():
            for check in CompositionConfig.when_loaded:
                check(folder, config)
        return cast(PeftConfig, config)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save as `adapter_config.json`; an interrupted save leaves an earlier file unchanged.

        If a built composition contains its factors, absolute paths of local adapters are shortened to their last part:
        others cannot use the rest, and it would reveal details of your machine.

        When called by `PeftModel.save_pretrained`, which saves the config last, it also completes the model card.

        Args:
            save_directory: the folder; created if it does not exist.
            **kwargs: passed to PEFT's `save_pretrained`.
        """
        folder = Path(save_directory)
        with draft_in(folder, CONFIG_DRAFT) as draft:
            super().save_pretrained(str(draft), **kwargs)
            fields = json.loads((draft / CONFIG_NAME).read_text(encoding="utf-8"))
            fields = without_local_paths(fields)
            (draft / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
            take_place(draft / CONFIG_NAME, folder / CONFIG_NAME)
        # PEFT calls it this way, after it has written weights and card; transformers saves the config first.
        if "auto_mapping_dict" in kwargs:
            _remove_outdated_weights(folder)
            for complete in CompositionConfig.when_saved:
                complete(folder)

    def _checked_weights(self) -> list[float] | None:
        """`weights` as floats; for softmax they sum to exactly 1, or to less."""
        weights = self.weights
        if weights is None:
            if self.mixing != "fixed":
                return None
            weights = [1 / len(self.adapter_names)] * len(self.adapter_names)
        if self.mixing == "uniform":
            raise ValueError('weights are given but mixing="uniform" ignores them; use "fixed" or "learned"')
        return checked_weights(weights, self.adapter_names, self.normalization)


def _remove_outdated_weights(folder: Path) -> None:
    """After saving a pickle, remove older safetensors, which PEFT would otherwise keep loading."""
    old, new = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if old.is_file() and new.is_file() and old.stat().st_mtime_ns < new.stat().st_mtime_ns:
        old.unlink()


def _require(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
