"""Makes `COMPOSITION` a PEFT method: a member of `PeftType` and an entry in PEFT's tables of configs and tuners.

PEFT has no hook for external methods, and `PeftType` is a closed enum; everything that works around that is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import PeftType

METHOD = "COMPOSITION"


def add_peft_type() -> PeftType:
    """Add the member `COMPOSITION` to `PeftType`, once.

    The member is added to every table that `enum` uses, so that lookup by value, name and attribute, iteration,
    `isinstance`, pickle and copies treat it like PEFT's own members.

    Returns:
        The member; later calls return the same object.
    """
    from peft.utils import PeftType

    known = PeftType.__members__.get(METHOD)
    if known is not None:
        return known
    member = str.__new__(PeftType, METHOD)
    member._name_ = METHOD
    member._value_ = METHOD
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(METHOD)
    PeftType._member_map_[METHOD] = member
    PeftType._value2member_map_[METHOD] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)  # Python 3.13 looks up `in` here
    if hashable_values is not None:
        hashable_values.append(METHOD)
    type.__setattr__(PeftType, METHOD, member)
    return member


def register_method(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Add the config and the tuner of the method to PEFT's tables; a second call changes nothing.

    Args:
        config_cls: the config class for `adapter_config.json` files of the method.
        model_cls: the tuner that `get_peft_model` builds for it.

    Raises:
        ImportError: PEFT or another plugin already has a method of this name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    member = add_peft_type()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is config_cls:
        return
    if registered is not None:
        raise ImportError(
            f"The PEFT method {METHOD} is already taken by {registered.__module__}.{registered.__qualname__}, so "
            "peft-composition cannot be used. If a newer PEFT brought it, use that method or install an older PEFT."
        )
    register_peft_method(name=METHOD.lower(), config_cls=config_cls, model_cls=model_cls)
