"""`Explanation`: findings about a composition that can be written as a page, a picture or text."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.card import complete_card
from ..checkpoint.explained import write_report
from ..drafts import CARD_DRAFT, draft_in, take_place
from .figures import figure_of
from .findings import Findings
from .page import page_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUFFIXES = (".html", ".md", ".png", ".json")


@dataclass(frozen=True)
class Explanation(Findings):
    """What a composition is made of and why, by evidence. `print` shows the main things; `save` writes all of it.

    Attributes:
        title: of the page.
        adapter_name: of the composition in its model.
        mixing: "learned", "fixed" or "uniform".
        normalization: "softmax" or "none".
        base_model: the base model's name.
        adapters: where they come from, and their weights.
        weights: `{module: {adapter: weight}}`, as `mixing_weights(model)` gives them.
        scores: of each adapter alone, of their uniform mix, of the base model and of the mix. Where the mix is the
            uniform one itself, there is no row of its own for the uniform one.
        left_out: what leaving each adapter out of the mix costs.
        updates: how large and how alike the adapters' updates are.
        classes: leave-one-out predictions by class; None for answers in tokens.
        tested: results on test data; None where none were given.
        similarities: `{module: {adapter: similarity}}`, as `layerwise_cka` gives them; None where none were given.
        data: the examples, in words.
        command: that made it; None where it was not given.
        versions: of the packages that made it.
        created: the day, as year-month-day.
        seconds: that it took.
    """

    def to_html(self) -> str:
        """The page, which needs no other file and no network."""
        return page_of(self)

    def figure(self) -> Figure:
        """The picture: the scores and what leaving one out costs, with intervals, above the weights by block.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return figure_of(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a file; what is there before stays whole until the new one is complete.

        Args:
            path: of the file. Its suffix says what is written: `.html`, `.md`, `.png` or `.json`.

        Returns:
            The path.

        Raises:
            ValueError: another suffix.
            ImportError: matplotlib is not installed, for `.png`.
        """
        target = Path(path)
        if target.suffix not in SUFFIXES:
            raise ValueError(f"{target.name}: the suffix must be one of {', '.join(SUFFIXES)}")
        with draft_in(target.parent, CARD_DRAFT) as draft:
            self.write(draft / target.name)
            take_place(draft / target.name, target)
        return target

    def save_beside(self, folder: str | os.PathLike[str]) -> None:
        """Write the report into the folder of the saved composition that it explains, and name it in the card.

        There it belongs to the weights beside it: when other weights are saved there, it is removed with a warning.

        Args:
            folder: that `save_pretrained` wrote.

        Raises:
            ValueError: there is no saved composition, or one with other adapters or weights.
        """
        write_report(folder, self)
        complete_card(Path(folder))

    def write(self, path: Path) -> None:
        """As `save`, into a new file."""
        if path.suffix == ".png":
            self.figure().savefig(path, dpi=150)
            return
        text = {
            ".html": self.to_html,
            ".md": self.to_markdown,
            ".json": lambda: json.dumps(self.to_dict(), indent=2),
        }[path.suffix]()
        path.write_text(text, encoding="utf-8")
