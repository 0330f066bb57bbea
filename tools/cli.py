"""The command `onlooker`."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status; without the extra `tools`, say how to install it."""
    try:
        from .commands import app

        app(args=None if argv is None else list(argv), prog_name="onlooker")
    except ModuleNotFoundError as missing:
        module = missing.name or ""
        if module.startswith("onlooker"):
            raise
        sys.exit(f"onlooker: the module {module} is missing; install it with: pip install 'onlooker[tools]'")


if __name__ == "__main__":
    main()
