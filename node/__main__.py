"""Run a node: `python -m onlooker.node --config node.toml`.

With `--print-ready` it writes one line of JSON to standard output once it takes questions, for the process that
started it: `{"ready": true, "node": …, "session": …, "pid": …, "endpoints": {"frames": …, "ask": …, …}}`.
Its log goes to standard error. It exits with 0 when it was asked to end, 1 when it could not start or its engine
failed, 2 for a mistake in the configuration, and 130 when a second signal ended it at once.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from ..protocol.errors import OnlookerError
from .config import ConfigError, NodeConfig, load, parse_setting
from .config_text import config_text
from .engine_protocol import EngineProtocol
from .logs import configure, take_over
from .node import EngineFailedError, Node, StartError
from .service import Service
from .signals import Interrupted, Signals

logger = logging.getLogger("onlooker.node")  # not `__main__`, which is nobody's name

EXIT_FAILED = 1
EXIT_CONFIG = 2
ENGINE_CLOSE_S = 1.0


class ClosableEngine(EngineProtocol, Protocol):
    """An engine and its end."""

    def close(self, timeout_s: float = ...) -> object: ...


LoadEngine = Callable[[NodeConfig], ClosableEngine]


def main(argv: Sequence[str] | None = None, load_engine: LoadEngine | None = None) -> int:
    """Run until a signal; return the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.print_config:
        print(config_text(), end="")
        return 0
    try:
        config = _configured(arguments)
        configure(config.log.level, config.log.format)
        node = Node(config)
    except ConfigError as error:
        for problem in error.problems:
            print(f"onlooker: {problem}", file=sys.stderr)
        return EXIT_CONFIG
    with Signals(node.request_stop) as signals:
        return _run(node, config, load_engine or _load_engine, signals, print_ready=arguments.print_ready)


def _run(node: Node, config: NodeConfig, load_engine: LoadEngine, signals: Signals, *, print_ready: bool) -> int:
    engine: ClosableEngine | None = None
    service = Service()
    try:
        node.start()
        service.loading(config.model)
        logger.info("loading the model", extra={"facts": {"model": config.model, "device": config.device}})
        with signals.interrupting():
            engine = _loaded(config, load_engine)
            node.attach(engine)
        if print_ready:
            _print_ready(node, config)
        service.ready()
        node.run(service.observe)
    except Interrupted:
        logger.info("ended before it was ready")
    except (StartError, EngineFailedError) as error:
        logger.error("%s", error)
        return EXIT_FAILED
    finally:
        service.stopping()
        node.close()
        if engine is not None:
            engine.close(ENGINE_CLOSE_S)
    return 0


def _loaded(config: NodeConfig, load_engine: LoadEngine) -> ClosableEngine:
    try:
        return load_engine(config)
    except (OnlookerError, OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        # Of the model, files, the device, or a missing package.
        logger.debug("where loading failed", exc_info=error)
        raise StartError(f"model: {config.model} cannot be loaded: {error}") from error


def _load_engine(config: NodeConfig) -> ClosableEngine:
    # torch and transformers: slow to import, and not needed for --help
    from .engine import load_engine
    from .model import use_few_threads

    take_over("transformers", "huggingface_hub")
    return load_engine(
        model=config.model,
        dtype=config.dtype,
        device=config.device,
        compile=config.compile,
        max_concurrent_questions=config.questions.max_concurrent,
        max_waiting_questions=config.questions.max_waiting,
        scratch_tokens=config.questions.scratch_tokens,
        max_together=config.max_together,
        prepare=use_few_threads,
    )


def _print_ready(node: Node, config: NodeConfig) -> None:
    ready = {
        "ready": True,
        "node": config.name,
        "session": node.session,
        "pid": os.getpid(),
        "endpoints": node.endpoints,
    }
    print(json.dumps(ready), flush=True)


def _configured(arguments: argparse.Namespace) -> NodeConfig:
    overrides: dict[str, object] = dict(parse_setting(text) for text in arguments.set)
    for key in ("model", "device", "dtype"):
        if getattr(arguments, key) is not None:
            overrides[key] = getattr(arguments, key)
    if arguments.log_level is not None:
        overrides["log.level"] = arguments.log_level
    if arguments.insecure:
        overrides["security.insecure"] = True
    return load(arguments.config, overrides, streams=arguments.stream)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onlooker node",
        description="Remember what cameras show, and answer questions about it over ZeroMQ.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a node.toml; see --print-config")
    parser.add_argument("--model", help="a folder, a hub id, or builtin")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or balanced")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--stream", action="append", default=[], metavar="NAME", help="add a stream; may be repeated")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other key, such as questions.max_waiting=8"
    )
    parser.add_argument("--insecure", action="store_true", help="allow to listen beyond this machine without CURVE")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    parser.add_argument("--print-config", action="store_true", help="print a node.toml with every setting, and exit")
    parser.add_argument("--print-ready", action="store_true", help="print one line of JSON once it takes questions")
    return parser


def leave(status: int) -> NoReturn:
    """End the process now: the interpreter's own end takes a second or two with torch in it."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
