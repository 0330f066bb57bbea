"""A node with a published model's sizes and random weights, to see what a machine holds before a checkpoint is there.

python -m onlooker.node.published_node --sizes qwen2.5-vl-3b --stream front
"""

import argparse
from collections.abc import Sequence

import torch

from .__main__ import leave
from .__main__ import main as run_node
from .config import NodeConfig
from .engine import Engine
from .model import resolve_device
from .published import PUBLISHED, build_published, default_dtype


def load_published_engine(name: str, config: NodeConfig) -> Engine:
    """An engine on a published model, warm and started, with a node's settings."""
    device = resolve_device(config.device)
    dtype = default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    engine = Engine(
        build_published(name, device=device, dtype=dtype),
        max_concurrent_questions=config.questions.max_concurrent,
        max_waiting_questions=config.questions.max_waiting,
        scratch_tokens=config.questions.scratch_tokens,
    )
    engine.warm_up(config.compile)
    engine.start()
    return engine


def main(argv: Sequence[str] | None = None) -> int:
    """Run a node with a published model; all other flags are the node's."""
    parser = argparse.ArgumentParser(
        description="A node with a published model's sizes and random weights; all other flags are the node's.",
        allow_abbrev=False,
    )
    parser.add_argument("--sizes", required=True, choices=sorted(PUBLISHED))
    args, flags = parser.parse_known_args(argv)
    return run_node(flags, load_engine=lambda config: load_published_engine(args.sizes, config))


if __name__ == "__main__":
    leave(main())
