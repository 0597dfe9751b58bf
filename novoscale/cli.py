"""The ``novoscale`` command."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:
    sys.exit("The novoscale command needs typer and rich: pip install 'novoscale[cli]'")

from novoscale import verify as verifying
from novoscale.checkpoint import deepspeed
from novoscale.checkpoint.latest_good import latest_good
from novoscale.doctor.command import doctor
from novoscale.memory.command import memory, plan
from novoscale.tools.local_ranks import RankError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """NovoGrad for models that do not fit: the same training, however the model is sharded."""


app.command()(memory)
app.command()(plan)
app.command()(latest_good)
app.command()(doctor)


@app.command()
def verify(
    config: Annotated[str, typer.Argument(help="DeepSpeed JSON, Accelerate YAML, or one of: ddp, fsdp2.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 10,
    model: Annotated[
        str, typer.Option(help="package.module:function that returns a model and a function batch.")
    ] = "novoscale.verify.runs:builtin_model",
    optimizer: Annotated[
        str | None, typer.Option(help="package.module:Class, any torch optimizer; default: the config's.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="key=value of --optimizer; repeat.")] = None,
    bound: Annotated[float | None, typer.Option(help="Largest relative deviation that passes.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for each run.")] = 300,
    device: Annotated[
        str, typer.Option(help="cpu, or cuda: this machine's GPUs; ranks that outnumber them share them.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Train under CONFIG on local ranks and in one process; fail if any parameter ends elsewhere.

    Prints two findings. "bits": whether one process that is given the same gradients ends with the same bits.
    "training": how far one process that computes its own ends from the ranks.

    Exit code 0: the same training, and for NovoGrad the same bits. 1: it is not, or a rank failed. 2: CONFIG
    cannot be put to the test.
    """
    console = Console(stderr=True, emoji=False)
    sys.path.insert(0, "")  # models and optimizers from the folder that this is started in
    try:
        with console.status(f"training on {ranks} ranks and in one process ..."):
            verdict = verifying.verify(
                config,
                ranks=ranks,
                steps=steps,
                model=model,
                optimizer=optimizer,
                options=_options(option or []),
                bound=bound,
                timeout=timeout,
                device=device,
            )
    except verifying.VerifyError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from None
    except RankError as error:
        console.print(error.brief(), style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        print(verdict.to_json())
    else:
        _show(verdict)
    raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def to_universal(
    source: Annotated[
        Path, typer.Argument(help="Folder of a tag of a DeepSpeed checkpoint, or a file of to-state-dict.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to be made.")],
) -> None:
    """Make a DeepSpeed checkpoint of a NovoGrad loadable on any number of ranks, under any stage of ZeRO.

    What ds_to_universal does for Adam. Load TARGET with "checkpoint": {"load_universal": true} in the
    DeepSpeed config. Exit code 0: written. 2: SOURCE cannot be converted.
    """
    _convert(deepspeed.to_universal, source, target)


@app.command()
def to_state_dict(
    source: Annotated[Path, typer.Argument(help="Folder of a tag of a DeepSpeed checkpoint.")],
    target: Annotated[Path, typer.Argument(help="File to be written.")],
) -> None:
    """Write the weights and the optimizer of a DeepSpeed checkpoint as a plain state dict by names.

    To go on under FSDP2 or in one process. Exit code 0: written. 2: SOURCE cannot be converted.
    """
    _convert(deepspeed.to_state_dict, source, target)


def _convert(function: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    console = Console(stderr=True, emoji=False)
    try:
        with console.status(f"converting {source} ..."):
            function(source, target)
    except ModuleNotFoundError as error:
        console.print(f"{source}: needs {error.name}: pip install 'novoscale[deepspeed]'", style="red")
        raise typer.Exit(2) from None
    except ValueError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    console.print(f"Written: {target}", highlight=False, soft_wrap=True)


def _options(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise verifying.VerifyError(f"--option {pair}: write it as key=value")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _show(verdict: verifying.Verdict) -> None:
    console = Console(emoji=False) if sys.stdout.isatty() else Console(emoji=False, width=110)
    for note in verdict.notes:
        console.print(f"note: {note}", highlight=False)
    training = verdict.training
    compared = f"{verdict.ranks} ranks ({verdict.sharding}) against one process, {verdict.steps} steps"
    console.print(f"{verdict.optimizer}: {compared}", highlight=False)
    table = Table("parameter", "deviation")
    shown = list(training.deviations.items())[:10]
    for name, value in shown:
        table.add_row(name, f"{value:.1e}", style="red" if value > training.bound else None)
    if len(training.deviations) > len(shown):
        table.add_row(f"{len(training.deviations) - len(shown)} more, all smaller", "")
    console.print(table)
    console.print(f"bits: {_bits(verdict.bits)}", highlight=False)
    name, worst = training.worst
    outcome = "[green]the same" if training.passed else "[red]not the same"
    bound = f"{training.rule} {training.bound:.1e}"
    console.print(f"training: {outcome}[/]: worst {worst:.1e} in {name}, {bound}", highlight=False)


def _bits(bits: verifying.Bits | None) -> str:
    if bits is None:
        return "[yellow]not compared[/]: what the wrapper gives the optimizer is not known"
    if bits.identical:
        return f"[green]identical[/], given the same gradients: {bits.elements:,} elements"
    names = [f"{name} {count:,}" for name, count in bits.different.items()]
    if len(names) > 3:
        names[3:] = [f"and {len(names) - 3} more parameters"]
    count = f"{sum(bits.different.values()):,} of {bits.elements:,} elements"
    return f"[red]not identical[/], given the same gradients: {count}: {', '.join(names)}"


if __name__ == "__main__":
    app()
