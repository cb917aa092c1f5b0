"""The command line: its commands, and how their errors end."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from counterlens.export.errors import ExportError

from ..errors import CounterlensError, UsageError
from ..terminal import StreamError, Terminated, safe_streams, stopping
from . import adapter, audit, metrics, surrogate
from .counterfactual import counterfactual
from .export import convert, export
from .options import (
    errors,
    filled,
    text_console,
)
from .pack import demo, info, samples
from .portable import register as register_portable
from .profile import profile
from .quality import quality
from .saliency import register as register_saliency
from .serve import serve

# torch, diffusers and everything that needs them are imported inside the commands: --help must answer at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> None:
    if asked:
        from counterlens.export.versions import installed

        packages = installed(("counterlens", "torch", "diffusers", "onnxruntime", "onnxruntime-gpu"))
        found = [f"{package} {version}" for package, version in packages.items()]
        text_console(as_json=False).print(", ".join([*found, f"Python {sys.version.split()[0]}"]))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", help="Say the versions.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Show what would have to change in an image for a model to change its mind."""


for command in (demo, counterfactual, quality, samples, export, convert, info, profile, audit.audit, serve):
    app.command()(command)
app.command("audit-merge")(audit.merge)
app.command("audit-report")(audit.report)
app.add_typer(metrics.app, name="metrics")
app.add_typer(adapter.app, name="adapter")
app.add_typer(surrogate.app, name="surrogate")
register_saliency(app)
register_portable(app)


class Command(TyperCommand):
    """A command that refuses what no option means, and says that it began before torch takes its seconds."""

    def __init__(self, *args: Any, help: str | None = None, **more: Any) -> None:
        """Its docstring's paragraphs, without the line breaks of the source: terminals have other widths."""
        paragraphs = "\n\n".join(" ".join(part.split()) for part in (help or "").split("\n\n"))
        super().__init__(*args, help=paragraphs, **more)

    def get_params(self, ctx: Any) -> Any:
        """Its parameters, with what tables hold in their help texts."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if getattr(param, "help", None):
                param.help = filled(param.help)
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty texts, which a shell makes of a variable that is not set: as a path they are this folder."""
        for before, text in zip(["", *args], args, strict=False):
            if text == "" or (text.startswith("--") and text.endswith("=")):
                name = text[2:-1] or before.lstrip("-") if before.startswith("--") or text else "argument"
                raise UsageError(f"{name}: it is empty")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        out = ctx.params.get("out")
        if isinstance(out, Path) and out.exists() and not out.is_dir():
            raise UsageError(f"out: {out} is not a folder; every command writes a folder of files")
        errors.print(f"{ctx.command_path.removeprefix('counterlens ')}: opening ...", style="dim")
        return super().invoke(ctx)


def _as_commands(parent: typer.Typer) -> None:
    for command in parent.registered_commands:
        command.cls = Command
    for group in parent.registered_groups:
        assert group.typer_instance is not None
        _as_commands(group.typer_instance)


_as_commands(app)


def _warn(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """A warning as one line, without the source that it comes from."""
    errors.print(f"warning: {message}", style="yellow")


def _run() -> int:
    """Run the command line; the exit code."""
    ClickException: Any = typer.BadParameter.__mro__[2]  # newer typers carry their own copy of click's
    try:
        code = app(prog_name="counterlens", standalone_mode=False)
    except (CounterlensError, ExportError) as error:
        errors.print(f"error: {error}", style="red")
        return getattr(error, "exit_code", 1)
    except ClickException as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help
            command = error.ctx.command_path if getattr(error, "ctx", None) else "counterlens"
            errors.print(f"error: {' '.join(error.format_message().split())} ({command} --help)", style="red")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (Terminated, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 143:  # an audit turns SIGTERM into this one
            raise
        errors.print("terminated; finished results are kept")
        return 143
    if code == 130:  # typer makes it of KeyboardInterrupt
        errors.print("interrupted; finished results are kept")
    return code or 0


def main() -> None:
    """Run the command line; errors become one line on stderr and exit code 2 (usage) or 1 (failure)."""
    warnings.showwarning = _warn
    try:
        with safe_streams(), stopping():
            code = _run()
    except StreamError as error:
        code = error.exit_code
        if not error.quiet:
            errors.print(f"error: {error}", style="red")
    sys.exit(code)


if __name__ == "__main__":
    main()
