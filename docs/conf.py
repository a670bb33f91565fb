"""How the documentation is built: pages in Markdown, a reference from docstrings, the command line from typer's help.

`python3 run.py docs` builds it into `build/docs`, without network; every warning of Sphinx is an error.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.writers.html5 import HTML5Translator

import peft_composition


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
project = "peft-composition"
author = "The peft-composition authors"
copyright = author
version = release = peft_composition.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["reference/_command_line.md"]

highlight_language = "none"  # of blocks that do not name theirs, most of them shell
html_math_renderer = "mathml"  # MathJax would come from the network
html_theme = "furo"
html_title = f"peft-composition {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# Docstrings write code between single backticks, and types where Google's style has them.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_display_short_literal_types = True

# Names of other projects: their inventories are on the network, which a build does without.
nitpicky = True
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|transformers|peft|accelerate|huggingface_hub|matplotlib|collections|contextlib|os|pathlib)\..*",
    ),
    (
        "py:class",
        r"(Weights|Similarities|Part)|peft_composition\.(references\.(Provenance|LoraLayout)|checkpoint\.explained\.Report)",
    ),  # see the docstrings
    ("py:class", r"'[\w -]+'"),  # a value in a Literal
    (
        "py:.*",
        r"(Tensor|Module|nn\.Module|PeftModel|Trainer|TrainingArguments|Figure|CommitInfo|Path|Callable|Any|optional|dtype)",
    ),
]

# Files of the repository outside of docs/ that are pages of the site, too: their copies in docs/_outside.
OUTSIDE = {
    ROOT / "benchmarks" / "results" / "results.md": "_outside/benchmark-results",
    ROOT / "benchmarks" / "results" / "gpu-check-h100.md": "_outside/gpu-check-h100",
    ROOT / "examples" / "few_shot_transfer" / "README.md": "_outside/study-program",
    ROOT / "CHANGELOG.md": "_outside/changelog",
    ROOT / "CONTRIBUTING.md": "_outside/contributing",
}
COMMAND_LINE = "peft_composition_cli"
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?!\w+:)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
PUBLIC = (
    "peft_composition",
    "peft_composition.analysis",
    "peft_composition.checkpoint",
    "peft_composition.choosing",
    "peft_composition.evidence",
    "peft_composition.explaining",
)


def mark_code(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Double the backticks of a docstring: a colon within `{module: weight}` ends nothing then."""
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in lines]


def write_generated(app: Sphinx) -> None:
    """Write the pages that are made of something else: copies of files outside, and what `--help` says."""
    for file, docname in OUTSIDE.items():
        _write(docname, file.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "typer", COMMAND_LINE, "utils", "docs", "--name", "peft-composition"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = text.partition("\n")[2].lstrip()  # the page has a title of its own
    text = re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n?", "", text, count=1)  # cut short there, whole below
    text = re.sub(
        r"(`[^`]*`)|(--[a-z][a-z-]+)", lambda found: found[1] or f"`{found[2]}`", text
    )  # two hyphens, not a dash
    _write("reference/_command_line", text)


def _write(docname: str, text: str) -> None:
    """Write a page unless it is as it was: Sphinx reads again what is newer."""
    page = HERE / f"{docname}.md"
    page.parent.mkdir(exist_ok=True)
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


def lead_inside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links as the repository needs them into links as the site needs them.

    Other pages by their path from docs/, images by their path from the page; of a file that is no page the text alone.
    A link to what does not exist stays, and Sphinx complains of it.
    """
    origin = next((file for file, page in OUTSIDE.items() if page == docname), HERE / f"{docname}.md")

    def turned(found: re.Match[str]) -> str:
        mark, text, path, anchor = found["mark"], found["text"], found["path"], found["anchor"] or ""
        target = (origin.parent / path).resolve()
        if not target.exists():
            return found[0]
        if mark:
            return f"![{text}]({os.path.relpath(target, (HERE / docname).parent)})"
        if target in OUTSIDE:
            return f"[{text}](/{OUTSIDE[target]}.md{anchor})"
        if target.suffix == ".md" and HERE in target.parents:
            return f"[{text}](/{target.relative_to(HERE).as_posix()}{anchor})"
        return text

    source[0] = LINK.sub(turned, source[0])


def inline_math(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers show by themselves."""
    self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_math(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula that stands alone."""
    self.body.append(f'<div class="math">{latex2mathml.tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


class LinkPublicNames(SphinxTransform):
    """Makes a link to the reference of `to_lora`, `to_lora(model)` and the like, wherever a page has them as code."""

    default_priority = 200

    def apply(self, **kwargs: object) -> None:
        if self.env.docname.startswith("reference/"):
            return
        for literal in list(self.document.findall(nodes.literal)):
            found = re.match(r"([A-Za-z_]\w+)(?:\(.*\))?$", literal.astext())
            if found is None or found[1] not in self.names() or isinstance(literal.parent, nodes.reference):
                continue
            link = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=self.names()[found[1]], refexplicit=True, refwarn=True
            )
            literal.replace_self(link)
            link += literal

    @staticmethod
    def names() -> dict[str, str]:
        """Public classes and functions: name -> where users import it from."""
        found: dict[str, str] = {}
        for name in reversed(PUBLIC):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            for member in getattr(module, "__all__", ()):
                if inspect.isclass(getattr(module, member)) or callable(getattr(module, member)):
                    found[member] = f"{name}.{member}"
        return found


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", mark_code, priority=100)  # before napoleon
    app.connect("builder-inited", write_generated)
    app.connect("source-read", lead_inside)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.add_transform(LinkPublicNames)
