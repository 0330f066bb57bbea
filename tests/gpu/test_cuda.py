"""What only a GPU can show: the same promises with its kernels, in float32 and in bfloat16."""

import time

import pytest

torch = pytest.importorskip("torch")

from onlooker.node.adapter import FAMILIES  # noqa: E402
from onlooker.node.chunk import Chunk, Picture  # noqa: E402
from onlooker.node.engine import load_engine  # noqa: E402
from onlooker.node.model import load_model  # noqa: E402
from onlooker.node.options import StreamOptions  # noqa: E402
from onlooker.node.random_checkpoint import write_checkpoint  # noqa: E402
from onlooker.node.verify import verify  # noqa: E402
from onlooker.protocol.messages import Ask  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exactness_gate_holds_on_the_gpu_in_float32(family, tmp_path):
    write_checkpoint(tmp_path, family)
    missed = [check for check in verify(load_model(str(tmp_path), device="cuda")) if not check.passed]
    assert not missed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_stream_is_encoded_and_asked_about(family, tmp_path, rng):
    write_checkpoint(tmp_path, family)
    engine = load_engine(str(tmp_path), dtype="bfloat16", device="cuda")
    try:
        engine.add_stream(StreamOptions("cam", memory_bytes=1 << 22)).result(60)
        pictures = [
            Picture(rng.integers(0, 256, (112, 168, 3), dtype="uint8"), i, i * 10**8, "media", i * 10**8)
            for i in range(8)
        ]
        for i in (0, 4):
            engine.encode("cam", Chunk(tuple(pictures[i : i + 4]))).result(60)
        questions = [Ask(stream="cam", question=f"What is it? {i}", max_new_tokens=8) for i in range(4)]
        futures = [engine.ask(question, arrived=time.monotonic()) for question in questions]
        assert all(future.result(60).memory.unchanged for future in futures)
        info, vram = engine.cache_info("cam"), engine.vram()
        assert info.logical_bytes == info.num_tokens * info.bytes_per_token > 0
        assert isinstance(vram.total_bytes, int) and vram.total_bytes > vram.weights_bytes > 0
    finally:
        assert engine.close()


@pytest.fixture
def rng():
    import numpy

    return numpy.random.default_rng(0)
