"""The command line: `python -m examples.few_shot_transfer run | list | report | cost`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Output = Annotated[Path, typer.Option(help="Folder for models, adapters and results.")]
Page = Annotated[Path | None, typer.Option(help="A page to write the tables into, in place of printing them.")]


@app.command()
def run(
    scenarios: Annotated[list[str] | None, typer.Argument(help="Names (see list) or YAML files.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="All scenarios that need no Hub.")] = False,
    hub: Annotated[bool, typer.Option("--hub", help="All scenarios at the paper's scale.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default: the scenario's.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated. Default: the scenario's.")] = None,
    shots: Annotated[str | None, typer.Option(help="Values of K, comma-separated. Default: the scenario's.")] = None,
    target: Annotated[str | None, typer.Option(help="One downstream task. Default: all.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="See that it runs; the figures mean nothing.")] = False,
    output: Output = Path("study-output"),
) -> None:
    """Run scenarios. A study that was stopped goes on where it was: give the same command again."""
    from . import scenario
    from .study import Study, limited

    names = _chosen(scenarios, offline, hub)
    be_quiet()
    chosen = tuple(methods.split(",")) if methods else None
    try:
        values = tuple(k if k == scenario.ALL else int(k) for k in shots.split(",")) if shots else None
        specs = [limited(scenario.load(name), seeds, chosen, values, target) for name in names]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for name, spec in zip(names, specs):
        asked = {"seeds": seeds, "methods": methods, "shots": shots, "target": target}
        options = [f"--{option} {value}" for option, value in asked.items() if value] + ["--smoke"] * smoke
        command = " ".join(["python -m examples.few_shot_transfer run", Path(name).name, *options])
        Study(scenario.smoke(spec) if smoke else spec, output, command=command).run()


@app.command()
def evidence(
    scenario_name: Annotated[str, typer.Argument(metavar="SCENARIO", help="A name (see list) or a YAML file.")],
    target: Annotated[str | None, typer.Option(help="One downstream task. Default: all.")] = None,
    shots: Annotated[str, typer.Option(help="Comma-separated.")] = "2,5,20",
    seeds: Annotated[int, typer.Option(min=2, help="Draws for each K.")] = 20,
    seeds_at_20: Annotated[int | None, typer.Option(min=0, help="For K = 20. Default: as for the others.")] = None,
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated: heads-and-vote, likelihood-vote, vote, stacking; two-views (at K = 1)."),
    ] = "likelihood-vote",
    trained: Annotated[bool, typer.Option("--trained", help="Recipes of training, too, on stand-ins.")] = False,
    output: Output = Path("study-output"),
    to: Annotated[Path | None, typer.Option(help="Folder for the records. Default: in --output.")] = None,
) -> None:
    """Mixing weights chosen by evidence against the uniform mix, over many draws with frozen bodies.

    What was measured is not measured again: give the same command to go on, or another with more draws.
    """
    from . import evidence as measuring
    from . import scenario
    from .gains import gains
    from .records import read

    be_quiet()
    spec = scenario.load(scenario_name)
    path = (to or output / "evidence") / f"{spec.name}.jsonl"
    chosen = [name for name in methods.split(",") if name]
    recipes = list(measuring.TRAINED) if trained else []
    many = {20: seeds if seeds_at_20 is None else seeds_at_20}
    draws = [(k, seed) for k in map(int, shots.split(",")) for seed in range(many.get(k, seeds))]
    for bench in measuring.open_benches(spec, output, target):
        known = read(path, key="method")
        measuring.append(measuring.compare(bench, draws, chosen, recipes, known), path)
    typer.echo(gains(read(path, key="method"), [*chosen, measuring.FIXED, *recipes]))


@app.command()
def elsewhere(
    scenario_name: Annotated[str, typer.Argument(metavar="SCENARIO", help="A name (see list) or a YAML file.")],
    target: Annotated[str | None, typer.Option(help="One downstream task. Default: all.")] = None,
    shots: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,5",
    seeds: Annotated[int, typer.Option(min=2, help="Draws for each K.")] = 20,
    size: Annotated[int, typer.Option(min=10, help="At most so many that the test sample does not have.")] = 600,
    whole: Annotated[bool, typer.Option("--whole", help="Judge on the test sample, too.")] = False,
    output: Output = Path("study-output"),
    to: Annotated[Path | None, typer.Option(help="Folder for the records. Default: in --output.")] = None,
) -> None:
    """Weights by evidence and heads against the uniform mix, judged on examples that the test split does not have."""
    from . import elsewhere as judging
    from . import scenario
    from .evidence import append, open_benches
    from .records import read

    be_quiet()
    spec = scenario.load(scenario_name)
    path = (to or output / "elsewhere") / f"{spec.name}.jsonl"
    draws = [(k, seed) for k in map(int, shots.split(",")) for seed in range(seeds)]
    for bench in open_benches(spec, output, target):
        append(judging.judge_elsewhere(bench, draws, size, read(path, key="method"), is_whole=whole), path)
    typer.echo(judging.elsewhere_table(read(path, key="method")))


@app.command()
def users(
    scenario_name: Annotated[
        str, typer.Argument(metavar="SCENARIO", help="A name (see list); of images with --fast.")
    ],
    target: Annotated[str | None, typer.Option(help="One downstream task. Default: all.")] = None,
    shots: Annotated[str, typer.Option(help="Comma-separated.")] = "5,10,20",
    seeds: Annotated[int, typer.Option(min=1, help="Users for each K.")] = 8,
    fast: Annotated[bool, typer.Option("--fast", help="Without what trains a body.")] = False,
    fresh_from: Annotated[
        Path | None, typer.Option(help="Folder of earlier records: simulate their users, keep their fresh LoRAs.")
    ] = None,
    output: Output = Path("study-output"),
    to: Annotated[Path | None, typer.Option(help="Folder for the records. Default: in --output.")] = None,
) -> None:
    """Simulated users of `compare`, for `calibration`; those that are there already are left out."""
    from . import scenario
    from .evidence import open_benches
    from .records import read
    from .users import simulate, with_tests, write

    be_quiet()
    spec = with_tests(scenario.load(scenario_name))
    path = (to or output / "users") / f"{spec.name}.jsonl"
    draws = [(k, seed) for seed in range(seeds) for k in map(int, shots.split(","))]
    earlier = None if fresh_from is None else read(fresh_from / path.name, key="methods")
    for bench in open_benches(spec, output, target):
        write(simulate(bench, draws, read(path, key="methods"), not fast, earlier=earlier), path)


@app.command()
def calibration(
    files: Annotated[list[Path], typer.Argument(help="Records that `users` wrote.")],
    page: Page = None,
) -> None:
    """How often the verdicts of `compare` on simulated users are wrong and how often they can tell, as Markdown."""
    from .calibration import tables

    _print_or_fill(tables, files, "methods", page)


@app.command()
def pools(
    scenario_name: Annotated[str, typer.Argument(metavar="SCENARIO", help="A name (see list), of sentences.")],
    target: Annotated[str | None, typer.Option(help="One downstream task. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of 20 per class that pools draw from.")] = 8,
    output: Output = Path("study-output"),
    to: Annotated[Path | None, typer.Option(help="Folder for the records. Default: in --output.")] = None,
) -> None:
    """Simulated pools of candidates, for `chances`; those that are there already are left out."""
    from . import scenario
    from .evidence import open_benches
    from .pools import simulate
    from .records import read
    from .users import with_tests, write

    be_quiet()
    spec = with_tests(scenario.load(scenario_name))
    path = (to or output / "pools") / f"{spec.name}.jsonl"
    for bench in open_benches(spec, output, target):
        write(simulate(bench, range(seeds), read(path, key="stated")), path)


@app.command()
def chances(
    files: Annotated[list[Path], typer.Argument(help="Records that `pools` wrote.")],
    page: Page = None,
) -> None:
    """How often the stated chance that a pick is worse than the base comes true, as Markdown."""
    from .pools import tables

    _print_or_fill(tables, files, "stated", page)


@app.command()
def verdicts(
    scenario_name: Annotated[str, typer.Argument(metavar="SCENARIO", help="A name (see list), of sentences.")],
    target: Annotated[str, typer.Option(help="The downstream task.")],
    k: Annotated[int, typer.Option(min=2, help="Examples of each class.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Draws.")] = 3,
    output: Output = Path("study-output"),
    to: Annotated[Path | None, typer.Option(help="Folder for the records. Default: in --output.")] = None,
) -> None:
    """Verdicts of a user with 200 test examples, beside what 1,000 others say; with a fresh LoRA on all blocks."""
    from . import known, scenario
    from .evidence import open_benches
    from .records import read
    from .users import with_tests, write

    be_quiet()
    spec = with_tests(scenario.load(scenario_name), more=known.SEEN)
    path = (to or output / "known") / f"{spec.name}-{target}-{k}.jsonl"
    if not read(path, key="methods"):
        for bench in open_benches(spec, output, target):
            write(known.outcomes(bench, k, range(seeds)), path)
    typer.echo(known.verdicts(read(path, key="methods")))


@app.command("gains")
def tabulate(
    files: Annotated[list[Path], typer.Argument(help="Records that `evidence` wrote.")],
    methods: Annotated[str | None, typer.Option(help="Separated by semicolons. Default: all that are there.")] = None,
    tasks: Annotated[bool, typer.Option(help="Each task, too, not only their means.")] = True,
    png: Annotated[Path | None, typer.Option(help="Draw them over K, with intervals, into this file.")] = None,
) -> None:
    """What methods gain on the uniform mix, task by task and on average, as Markdown."""
    from .gains import CONTROLS, gains, means, of_tasks
    from .plots import gain_over_shots
    from .records import read

    records = [record for path in files for record in read(path, key="method")]
    found = dict.fromkeys(record["method"] for record in records)
    default = [name for name in found if name not in ("single", "uniform", *CONTROLS)]
    chosen = default if methods is None else methods.split(";")
    typer.echo(means(records, chosen) + (f"\n\n{gains(records, chosen)}" if tasks else ""))
    if png is not None:
        gain_over_shots(of_tasks(records, [*CONTROLS, *chosen])).savefig(png)


@app.command()
def answers(
    scenario_name: Annotated[str, typer.Argument(metavar="SCENARIO", help="Of a language model, or a YAML file.")],
    target: Annotated[str | None, typer.Option(help="One downstream task. Default: all.")] = None,
    shots: Annotated[str | None, typer.Option(help="Comma-separated. Default: the scenario's.")] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="Draws for each K. Default: the scenario's.")] = None,
    trained: Annotated[int, typer.Option(min=0, help="So many draws of each K train the weights, too.")] = 0,
    output: Output = Path("study-output"),
    to: Annotated[Path | None, typer.Option(help="Folder for the records. Default: in --output.")] = None,
) -> None:
    """Mixing weights of a language model, chosen by the likelihood of the answers, against the uniform mix.

    What was measured is not measured again: give the same command to go on, or another with more draws.
    """
    from . import answers as measuring
    from . import scenario
    from .evidence import append
    from .records import read

    be_quiet()
    spec = scenario.load(scenario_name)
    if not spec.is_language:
        raise typer.BadParameter(f"{scenario_name} has no language model: use the command evidence")
    path = (to or output / "evidence") / f"{spec.name}.jsonl"
    chosen = [int(k) for k in (shots.split(",") if shots else spec.downstream.shots)]
    draws = [(k, seed) for k in chosen for seed in range(seeds or spec.downstream.seeds)]
    for bench in measuring.open_answer_benches(spec, output, target):
        append(measuring.compare_answers(bench, draws, trained, read(path, key="method")), path)
    answer_table([path])


@app.command("long-answers")
def long_answers(
    shots: Annotated[str, typer.Option(help="Comma-separated, examples in all.")] = "2,5,20",
    seeds: Annotated[int, typer.Option(min=2, help="Draws for each K.")] = 20,
    trained: Annotated[int, typer.Option(min=0, help="So many draws of each K train the weights, too.")] = 6,
    output: Output = Path("study-output"),
    to: Annotated[Path | None, typer.Option(help="Folder for the records. Default: in --output.")] = None,
) -> None:
    """The same for answers of 10 to 25 tokens in a made language, by an encoder-decoder model that is trained here."""
    from . import answers as measuring
    from .evidence import append
    from .long_answers import open_made_benches
    from .records import read

    be_quiet()
    path = (to or output / "evidence") / "long-answers.jsonl"
    draws = [(k, seed) for k in map(int, shots.split(",")) for seed in range(seeds)]
    for bench in open_made_benches(output):
        append(measuring.compare_answers(bench, draws, trained, read(path, key="method")), path)
    answer_table([path])


@app.command("answer-table")
def answer_table(
    files: Annotated[list[Path], typer.Argument(help="Records that `answers` wrote.")],
    targets: Annotated[str | None, typer.Option(help="Comma-separated tasks. Default: all.")] = None,
    overview: Annotated[str | None, typer.Option(help="A way: one row for each task, of this way alone.")] = None,
    way: Annotated[str, typer.Option(help="Whose gains are shown with --far-better.")] = "posterior",
    far_better: Annotated[
        float | None, typer.Option(help="Tasks alone where an adapter gains so many points.")
    ] = None,
) -> None:
    """What ways to choose a language model's weights gain on the uniform mix, as Markdown."""
    from .answer_tables import HOW, answer_gains, answer_overview
    from .far_better import far_better_table
    from .records import read

    records = [record for path in files for record in read(path, key="method")]
    if targets:
        records = [record for record in records if record["target"] in targets.split(",")]
    if far_better is not None:
        typer.echo(far_better_table(records, far_better, way))
        return
    if overview:
        typer.echo(answer_overview(records, overview))
        return
    typer.echo("\n\n".join(answer_gains(records, measure) for measure in HOW))


@app.command()
def defaults(
    tasks: Annotated[str | None, typer.Option(help="Comma-separated, scenario:task. Default: four.")] = None,
    methods: Annotated[str | None, typer.Option(help="Separated by semicolons. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Draws of the examples.")] = 6,
    k: Annotated[int | None, typer.Option(min=1, help="Examples of each class. Default: the script's.")] = None,
    output: Output = Path("study-output"),
    to: Annotated[Path | None, typer.Option(help="File for the records. Default: in --output.")] = None,
) -> None:
    """What the example script and the README's lines reach as they are, beside the script's controls: real runs.

    What was measured is not measured again: give the same command to go on, or another with more draws.
    """
    from . import defaults as measuring
    from .evidence import append
    from .gains import gains, means
    from .records import read

    be_quiet()
    path = to or output / "defaults.jsonl"
    chosen = methods.split(";") if methods else [*measuring.METHODS, measuring.PRINTED, measuring.EQUAL]
    of = tasks.split(",") if tasks else measuring.TASKS
    append(measuring.measure(of, chosen, range(seeds), k, output, read(path, key="method")), path)
    records = read(path, key="method")
    rows = list(dict.fromkeys(record["method"] for record in records if record["method"] != "uniform"))
    typer.echo(means(records, rows))
    typer.echo(gains(records, rows))


@app.command()
def report(
    scenarios: Annotated[list[str] | None, typer.Argument(help="Default: all that have results.")] = None,
    output: Output = Path("study-output"),
    to: Annotated[Path, typer.Option(help="Folder for the page and its plots.")] = Path("study-report"),
) -> None:
    """Turn the results into Markdown tables and plots."""
    from . import scenario
    from .report import write

    try:
        specs = [scenario.load(name) for name in scenarios or scenario.names()]
        typer.echo(write(specs, output / "results", to))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def cost(
    scenarios: Annotated[list[str] | None, typer.Argument(help="Names (see list) or YAML files.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="All scenarios that need no Hub.")] = False,
    hub: Annotated[bool, typer.Option("--hub", help="All scenarios at the paper's scale.")] = False,
    tflops: Annotated[float, typer.Option(min=0.001, help="10^12 operations a second that the GPU sustains.")] = 20.0,
    images: Annotated[float, typer.Option(min=0.001, help="Images that are read and decoded in a second.")] = 1600.0,
) -> None:
    """Estimate GPU hours and memory, without data or weights. Nothing is run."""
    from . import scenario
    from .cost import Assumptions, write

    be_quiet()
    try:
        specs = [scenario.load(name) for name in _chosen(scenarios, offline, hub)]
        typer.echo(write(specs, Assumptions(tflops=tflops, images=images)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command("list")
def list_scenarios() -> None:
    """List the scenarios."""
    from rich.console import Console
    from rich.table import Table

    from . import scenario

    table = Table("scenario", "scale", "shift", "repeats", "title")
    for name in scenario.names():
        spec = scenario.load(name)
        table.add_row(name, spec.scale, spec.shift, spec.paper or "", spec.title)
    Console().print(table)


def _chosen(scenarios: list[str] | None, offline: bool, hub: bool) -> list[str]:
    from . import scenario

    names = list(scenarios or [])
    names += scenario.names("offline") if offline else []
    names += scenario.names("hub") if hub else []
    if not names:
        raise typer.BadParameter("name a scenario, or give --offline or --hub")
    return names


def _print_or_fill(
    tables_of: Callable[[list[dict[str, Any]]], Mapping[str, str]], files: list[Path], key: str, page: Path | None
) -> None:
    """Tables of the records in some files, which all have a key, printed or put in their places on a page."""
    from .markdown import filled
    from .records import read

    tables = tables_of([record for path in files for record in read(path, key=key)])
    if page is None:
        typer.echo("\n\n".join(f"### {name}\n\n{text}" for name, text in tables.items()))
    else:
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def be_quiet() -> None:
    """Leaves the screen to the progress bars."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's to heed
    # A packaged model is named by its id on the Hub, where PEFT does not find it; no vocabulary is changed here.
    warnings.filterwarnings("ignore", message="Could not find a config file")


if __name__ == "__main__":
    app()
