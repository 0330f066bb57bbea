"""A node's engine at a published model's sizes, with random weights, on the GPU.

    python tests/gpu/published_sizes.py [--chunks 8] [--size 1920x1080] [--json FILE]

Speed and memory do not depend on the values of the weights, so no checkpoint is needed. Encodes chunks of four
frames into a memory while questions are asked, and prints where the time and the memory went.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from onlooker.node.chunk import Chunk, Picture
from onlooker.node.engine import Engine
from onlooker.node.model import VisionLanguageModel
from onlooker.node.options import StreamOptions
from onlooker.node.random_checkpoint import SPECIAL_TOKENS, build_tokenizer
from onlooker.protocol.messages import Ask, AskChoice

# Qwen/Qwen2.5-VL-3B-Instruct
TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}


def build() -> VisionLanguageModel:
    """The model on the GPU, bfloat16, with the small tokenizer."""
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config = transformers.AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        network = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(Path(folder) / "tokenizer.json"), eos_token="<|im_end|>"
        )
    return VisionLanguageModel(network, fast, name="Qwen2.5-VL-3B sizes, random", processor={}, notice=None)


def run(num_chunks: int, size: tuple[int, int]) -> dict[str, object]:
    """Encode and ask; returns the figures."""
    width, height = size
    model = build()
    engine = Engine(model)
    engine.start()
    engine.add_stream(StreamOptions("cam", memory_bytes=8 << 30)).result()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(4)]

    def chunk(i: int) -> Chunk:
        start = 4 * i
        times = [(start + j) * 125_000_000 for j in range(4)]
        return Chunk(tuple(Picture(frames[j], start + j, t, "media", t) for j, t in enumerate(times)))

    engine.encode("cam", chunk(0)).result()  # warm-up
    began = time.perf_counter()
    encoded = [engine.encode("cam", chunk(i)).result() for i in range(1, num_chunks)]
    alone_s = (time.perf_counter() - began) / (num_chunks - 1)

    def ask(question: str, num_tokens: int):  # type: ignore[no-untyped-def]
        request = Ask(stream="cam", question=question, max_new_tokens=num_tokens)
        return engine.ask(request, arrived=time.monotonic())

    ask("warm-up", 4).result()
    one = ask("What is in the picture?", 32).result()
    together = [ask(f"Question {i}: what is in the picture?", 32) for i in range(8)]
    began = time.perf_counter()
    while_asked = [engine.encode("cam", chunk(num_chunks + i)).result() for i in range(2)]
    asked_s = (time.perf_counter() - began) / 2
    answers = [future.result() for future in together]
    choice = engine.ask_choice(
        AskChoice(stream="cam", question="Which colour?", options=["red", "blue", "green"]), arrived=time.monotonic()
    ).result()
    info, vram = engine.cache_info("cam"), engine._read_vram()
    engine.close()
    assert all(answer.memory.unchanged for answer in (one, *answers)) and choice.memory.unchanged
    assert info.logical_bytes == info.num_tokens * 36_864
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "received": f"{width}x{height}",
        "encoded": "x".join(map(str, encoded[0].encoded_size)),
        "tokens_per_chunk": encoded[-1].num_tokens,
        "tokens": info.num_tokens,
        "cache_bytes": info.logical_bytes,
        "chunk_ms": alone_s * 1e3,
        "frames_per_s": 4 / alone_s,
        "preprocess_ms": statistics.median(e.preprocess_ms for e in encoded),
        "vision_ms": statistics.median(e.vision_ms for e in encoded),
        "prefill_ms_last": encoded[-1].prefill_ms,
        "chunk_ms_while_8_asked": asked_s * 1e3,
        "tokens_while_asked": sum(e.num_tokens for e in while_asked),
        "first_token_ms": one.timing.first_token_ms,
        "ms_per_token": one.timing.decode_ms / max(1, one.num_answer_tokens - 1),
        "num_answer_tokens": one.num_answer_tokens,
        "choice_ms": choice.timing.total_ms,
        "weights_bytes": vram.weights_bytes,
        "kv_reserved_bytes": vram.kv_bytes,
        "activations_peak_bytes": vram.activations_peak_bytes,
        "torch_peak_bytes": vram.torch_peak_bytes,
        "device_free_bytes": vram.free_bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--size", default="1920x1080")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    figures = run(args.chunks, (width, height))
    for name, value in figures.items():
        print(f"{name:<26}{value:>16,.1f}" if isinstance(value, float) else f"{name:<26}{value!s:>16}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
