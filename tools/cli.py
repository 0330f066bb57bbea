"""The command `onlooker`."""

import sys
from collections.abc import Sequence

# Modules of the extras that only some commands need; all others are of the extra `tools`.
EXTRAS = {
    "prometheus_client": "metrics",
    "mcap": "record",
    "mcap_protobuf": "record",
    "foxglove_schemas_protobuf": "record",
    "google": "record",  # protobuf
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status; without the extra it needs, say how to install that."""
    try:
        from .commands import app

        app(args=None if argv is None else list(argv), prog_name="onlooker")
    except ModuleNotFoundError as missing:
        module = missing.name or ""
        if module.startswith("onlooker"):
            raise
        extra = EXTRAS.get(module.partition(".")[0], "tools")
        sys.exit(f"onlooker: the module {module} is missing; install it with: pip install 'onlooker[{extra}]'")


if __name__ == "__main__":
    main()
