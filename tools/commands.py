"""The commands of `onlooker`, each a function of a file of this folder, imported only when it is run."""

import importlib
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..protocol.errors import NoReplyError, OnlookerError

EXIT_FAILED, EXIT_NO_REPLY, EXIT_INTERRUPTED = 1, 3, 130


@dataclass(frozen=True, slots=True)
class Entry:
    """The file that holds a command's function, and the command's line in the help."""

    module: str
    summary: str


COMMANDS = {
    "demo": Entry("demo", "Show it all in one terminal: a node, a clip, four questions, the telemetry."),
    "node": Entry("node", "Run a node."),
    "verify": Entry("verify", "Prove on this machine that the memory and the answers are exact."),
    "qa": Entry("qa", "Ask a node questions with known answers, and score what it says."),
    "bench": Entry("bench", "Measure encoding and answering on this machine, beside their limits."),
    "capacity": Entry("capacity", "Find out how much of a video a node can remember."),
    "report": Entry("report", "Make a page of the JSON of qa, capacity, bench or verify: one file, with its plots."),
    "replay": Entry("replay", "Publish video files to a node, as cameras would, or repeat a recorded session."),
    "camera": Entry("camera", "Publish a webcam or a network camera to a node."),
    "ask": Entry("ask", "Ask about what a stream has shown."),
    "watch": Entry("watch", "Watch the memory, VRAM, frames and questions of a node."),
    "record": Entry("record", "Record frames, questions, answers and telemetry into an MCAP file, until Ctrl-C."),
    "metrics": Entry("metrics", "Export the figures of a node to Prometheus, with /livez and /readyz."),
    "web": Entry("web", "Watch, feed and ask a node in the browser."),
    "status": Entry("memory", "Say what a node is and how it does."),
    "streams": Entry("memory", "List the streams of a node and what is remembered of each."),
    "add": Entry("memory", "Add a stream to a node, which reserves its memory."),
    "remove": Entry("memory", "Remove a stream from a node, with all that is remembered of it."),
    "pause": Entry("memory", "Drop a stream's frames until it is resumed; what is remembered stays."),
    "resume": Entry("memory", "Take in the frames of a paused stream again."),
    "reset": Entry("memory", "Forget everything a stream has shown, marks too."),
    "mark": Entry("memory", "Name a stream's memory as it is now."),
    "rollback": Entry("memory", "Forget everything a stream has shown since a mark."),
    "marks": Entry("memory", "List the marks of a stream."),
    "keygen": Entry("keygen", "Make a key pair for a node, a camera or a client."),
}


class Commands(TyperGroup):
    """Lists every command; imports the one that is run, and turns its errors into a line and a status."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=entry.summary) for name, entry in COMMANDS.items()}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OnlookerError as error:
            typer.echo(f"onlooker: {error}", err=True)
            status = EXIT_NO_REPLY if isinstance(error, NoReplyError) else EXIT_FAILED
            raise typer.Exit(status) from error


def load(name: str) -> TyperCommand:
    """Import the file of a command and make the command of its function of that name.

    A file whose command takes flags it does not know has CONTEXT_SETTINGS.
    """
    entry = COMMANDS[name]
    module = importlib.import_module(f".{entry.module}", __package__)
    alone = typer.Typer(add_completion=False)
    alone.command(name, context_settings=getattr(module, "CONTEXT_SETTINGS", None))(getattr(module, name))
    command = typer.main.get_command(alone)
    assert isinstance(command, TyperCommand)
    return command


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"onlooker {version('onlooker')}")
        raise typer.Exit()


@app.callback()
def onlooker(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """A camera stream in the KV cache of a vision-language model, open to questions over ZeroMQ."""
