"""What other packages keep to themselves is named in one place: a new version of theirs is a matter of one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import nn

import peft_composition
from peft_composition import compat


PACKAGE = Path(peft_composition.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
ONLY_IN_SOME_VERSIONS = ("transformers.conversion_mapping", "transformers.core_model_loading")
OTHERS = {"torch", "peft", "transformers", "huggingface_hub", "accelerate", "safetensors"}


def private_uses(source: str) -> list[str]:
    """Imports of private names or of version-dependent modules, and private attributes of imported modules."""
    tree = ast.parse(source)
    imported: set[str] = set()
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            imported |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {alias.asname or alias.name for alias in node.names}
        else:
            continue
        for name in names:
            private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
            if name.partition(".")[0] in OTHERS and (private or name.startswith(ONLY_IN_SOME_VERSIONS)):
                uses.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            text = ast.unparse(node)
            if isinstance(root, ast.Name) and root.id in imported and text.split(".")[0] in {"nn", "dist", *OTHERS}:
                uses.append(text)
    return uses


def test_the_search_sees_every_way() -> None:
    source = (
        "import torch\nimport torch.distributed as dist\nfrom torch import nn\n"
        "from peft.tuners.tuners_utils import _a\n"
        "from transformers.core_model_loading import WeightRenaming\nfrom . import _mine\n"
        "def f(self):\n    self._b\n    nn.modules.module._c()\n    dist.d._e()\n    import huggingface_hub._f\n"
    )
    assert private_uses(source) == [
        "peft.tuners.tuners_utils._a",
        "transformers.core_model_loading.WeightRenaming",
        "huggingface_hub._f",
        "nn.modules.module._c",
        "dist.d._e",
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_private_names_are_in_compat_alone(path: Path) -> None:
    uses = private_uses(path.read_text(encoding="utf-8"))
    if path.name == "compat.py":
        assert uses
    else:
        assert uses == []


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_global_hooks_are_seen(register: object) -> None:
    assert not compat.has_global_hooks()
    handle = register(lambda *_: None)  # type: ignore[operator]
    try:
        assert compat.has_global_hooks()
    finally:
        handle.remove()
    assert not compat.has_global_hooks()
