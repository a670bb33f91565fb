"""`peft-composition weights`: the mixing weights of a saved composition as tables and a heatmap."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..analysis.report import Part, plot_weights, weights_table
from ..checkpoint.saved import SavedComposition, saved_mixing_weights
from ..terminal import print_json, print_means, print_parts, say


def run(folder: Path, png: Path | None, by: Part, as_json: bool) -> None:
    """Print the mixing weights of a saved composition and, if a file is given, plot them."""
    mixed = saved_mixing_weights(folder)
    names = SavedComposition.opened(folder).config.adapter_names
    whole, parts = weights_table(mixed, adapters=names), weights_table(mixed, by, names)
    if as_json:
        rows = [asdict(row) for row in (*whole, *parts)]
        print_json({"mixing_weights": mixed, "table": rows, "png": str(png) if png else None})
    else:
        print_means(whole)
        if by != "model":
            print_parts(parts, whole, by)
    if png is None:
        return
    figure = plot_weights(mixed, by, f"Mixing weights of {folder.resolve().name}", names)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=150)
    if not as_json:
        say(f"Heatmap: {png}")
