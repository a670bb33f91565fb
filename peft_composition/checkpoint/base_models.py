"""Chooses the transformers class that loads a base model, by the task, the adapters and the model's own config.

Adapters state `CAUSAL_LM` for models that `AutoModelForCausalLM` does not support (Qwen2-VL, SmolVLM), or of which it
builds only a part (the decoder of Whisper, the language model of Llama 4).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..text import one_line


# For each task type of PEFT the classes that load a model for it, each with the table of the models that it supports;
# the class that the task is named after comes first.
AUTO_CLASSES: dict[str, dict[str, str]] = {
    "SEQ_CLS": {
        "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
        "AutoModelForVideoClassification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING",
    },
    "SEQ_2_SEQ_LM": {
        "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
        "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
        "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    },
    "CAUSAL_LM": {
        "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
        "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
        "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
        "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    },
    "TOKEN_CLS": {
        "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
        "AutoModelForAudioFrameClassification": "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING",
    },
    "QUESTION_ANS": {
        "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
        "AutoModelForVisualQuestionAnswering": "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING",
        "AutoModelForDocumentQuestionAnswering": "MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING",
    },
    "FEATURE_EXTRACTION": {"AutoModel": "MODEL_MAPPING"},
}


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model reads texts in both directions, as BERT does; transformers would load it as a causal one."""
    is_masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    other = ("is_decoder", "is_encoder_decoder", "causal")  # the last is what XLM says
    return is_masked and not any(getattr(config, name, False) for name in other)


@dataclass(frozen=True)
class Loader:
    """A transformers class that loads a base model.

    Attributes:
        name: the name of the class.
        builds: the class of the loaded model.
    """

    name: str
    builds: type[PreTrainedModel]

    @property
    def loads(self) -> Any:
        """The transformers class."""
        return getattr(transformers, self.name)

    @property
    def is_classifier(self) -> bool:
        """Whether the model has a head for a number of labels."""
        return "Classification" in self.builds.__name__

    def from_pretrained(
        self,
        base: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        num_labels: int | None = None,
        is_reported: bool = True,
    ) -> tuple[nn.Module, list[str]]:
        """Load a base model.

        Args:
            base: Hub id or folder.
            revision: the revision, for a Hub id.
            dtype: dtype of the weights. Default: as saved.
            num_labels: number of labels of the head; a head of another size is replaced. Default: as in the base's
                config.
            is_reported: whether transformers reports new weights. If False, the caller has to report them.

        Returns:
            The model, and the names of the modules that are missing in the base's weights and so are new and
            untrained.
        """
        kwargs: dict[str, Any] = {"revision": revision} if revision else {}
        if num_labels is not None:
            kwargs.update(num_labels=num_labels, ignore_mismatched_sizes=True)
        with _named(base), _load_report(is_reported):
            model, info = self.loads.from_pretrained(base, dtype=dtype or "auto", output_loading_info=True, **kwargs)
        keys = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
        return model, sorted({key.rpartition(".")[0] for key in keys})

    def empty(self, config: PretrainedConfig) -> nn.Module:
        """The model on the meta device: modules and shapes without values."""
        with torch.device("meta"):
            return self.loads.from_config(config) if hasattr(self.loads, "from_config") else self.loads(config)


def base_config(base: str, revision: str | None = None) -> PretrainedConfig:
    """The config of a base model.

    Args:
        base: Hub id or folder.
        revision: the revision, for a Hub id.

    Raises:
        ValueError: the folder does not exist, or the Hub could not be reached.
        OSError: the Hub has no such model, or the model has no config.
    """
    with _named(base):
        return AutoConfig.from_pretrained(base, revision=revision)


def loaders(task: str | None, config: PretrainedConfig, stated: str | None = None) -> list[Loader]:
    """The classes that can load a base model, the most likely first; no two build the same model.

    Args:
        task: task type of PEFT, or None.
        config: the config of the base model.
        stated: class of the model that an adapter was trained on, if the adapter states it. Ignored if transformers
            has no such class for this base model.

    Returns:
        The stated class, the classes for the task, the base model's own (`architectures`) and, if there are none of
        these, `AutoModel`.

    Raises:
        ValueError: the task type is unknown.
    """
    if task is not None and task not in AUTO_CLASSES:
        raise ValueError(f"task type {task!r} is unknown; use one of {', '.join(AUTO_CLASSES)}")
    found: dict[type, Loader] = {}

    def add(name: str, builds: type[PreTrainedModel] | None) -> None:
        if builds is not None:
            found.setdefault(builds, Loader(name, builds))

    trained_on = _model_class(stated)
    if trained_on is not None and trained_on.config_class in (type(config), *_sub_configs(config)):
        add(class_to_load(task, trained_on.__name__), trained_on)
    for name, table in AUTO_CLASSES.get(task or "", {}).items():
        for builds in _known(table, type(config)):
            add(name, builds)
    for name in config.architectures or ():
        add(name, _model_class(name))
    if not found:
        name = next(iter(AUTO_CLASSES[task])) if task else "AutoModel"  # its error says what is missing
        return [Loader(name, PreTrainedModel)]
    return list(found.values())


def choose(candidates: list[Loader], config: PretrainedConfig, fits: Callable[[nn.Module], bool]) -> Loader:
    """The first class whose model, built without values, fits; if none does, the first class."""
    if len(candidates) == 1:
        return candidates[0]
    return next((loader for loader in candidates if fits(loader.empty(config))), candidates[0])


def class_to_load(task: str | None, model_class: str) -> str:
    """The name of the class that loads a model of a given class: the `AutoModelFor...` of the task, or itself."""
    builds = _model_class(model_class)
    for name, table in AUTO_CLASSES.get(task or "", {}).items():
        if builds is not None and builds in _known(table, builds.config_class):
            return name
    return model_class


def stated_class(config: Mapping[str, Any]) -> str | None:
    """The transformers class that an adapter's config says it was trained on; None if it states none."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return name if _model_class(name) is not None else None


def _model_class(name: object) -> type[PreTrainedModel] | None:
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _known(table: str, config_class: type[PretrainedConfig] | None) -> tuple[type[PreTrainedModel], ...]:
    """The model classes that a table has for a config; the table may be newer than the installed transformers."""
    mapping = getattr(transformers, table, None)
    if mapping is None or config_class not in mapping:
        return ()
    classes = mapping[config_class]
    return classes if isinstance(classes, tuple) else (classes,)


def _sub_configs(config: PretrainedConfig) -> tuple[type[PretrainedConfig], ...]:
    return tuple(getattr(config, "sub_configs", {}).values())


@contextmanager
def _named(base: str) -> Iterator[None]:
    """Name the base model in errors of transformers about a network that cannot be reached."""
    try:
        yield
    except OSError as error:
        if os.path.isdir(base):
            raise
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, LocalEntryNotFoundError):
                raise ValueError(
                    f"base model {one_line(base)} is neither a local folder nor in the Hub cache, and the Hub could "
                    "not be reached"
                ) from error
            if isinstance(cause, HFValidationError):
                raise ValueError(
                    f"base model {one_line(base)} is neither a local folder nor a valid Hub id"
                ) from error
            cause = cause.__cause__
        raise


@contextmanager
def _load_report(is_shown: bool) -> Iterator[None]:
    """Suppress transformers' report about a loaded model, unless loading fails: its errors refer to the report."""
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_report = " LOAD REPORT" in record.getMessage()
        if is_report:
            held.append(record)
        return not is_report

    if is_shown:
        yield
        return
    logger.addFilter(hold)
    try:
        yield
    except Exception:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(hold)
