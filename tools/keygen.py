"""`onlooker keygen`: key pairs for CURVE.

onlooker keygen keys node
onlooker keygen keys gate-camera
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..protocol.codec import check_stream_name
from ..protocol.curve import generate, write_keypair
from ..protocol.errors import DecodeError
from .commands import EXIT_FAILED


def keygen(
    folder: Annotated[Path, typer.Argument(help="Where to write them; made if it is missing.")],
    name: Annotated[str, typer.Argument(help="Whose they are: letters, digits, '.', '_' and '-'.")],
) -> None:
    """Make a key pair for a node, a camera or a client.

    NAME.key is public: it goes to those who are to recognise the owner. NAME.key_secret is readable by its owner
    alone and stays where it is. Keys that exist are never overwritten.
    """
    try:
        public, secret = write_keypair(folder, check_stream_name(name), generate())
    except DecodeError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from error
    except OSError as error:
        typer.echo(f"onlooker: {error.filename or folder}: {error.strerror}", err=True)
        raise typer.Exit(EXIT_FAILED) from error
    typer.echo(f"{public}\n{secret}")
