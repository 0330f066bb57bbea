"""What only a GPU can show: the same promises with its kernels, in float32 and in bfloat16."""

import time

import pytest

torch = pytest.importorskip("torch")

from onlooker.node.adapter import FAMILIES  # noqa: E402
from onlooker.node.branch import Scratch  # noqa: E402
from onlooker.node.chunk import Chunk, Picture  # noqa: E402
from onlooker.node.engine import Engine, load_engine  # noqa: E402
from onlooker.node.model import load_model  # noqa: E402
from onlooker.node.options import StreamOptions  # noqa: E402
from onlooker.node.pace import Pace  # noqa: E402
from onlooker.node.random_checkpoint import write_checkpoint  # noqa: E402
from onlooker.node.upload import Uploader  # noqa: E402
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_node_s_layers_are_compiled_and_its_steps_captured(dtype, tmp_path, caplog):
    write_checkpoint(tmp_path, "qwen2_5_vl")
    model = load_model(str(tmp_path), dtype=dtype, device="cuda")
    engine = Engine(model, max_concurrent_questions=3, scratch_tokens=256)
    plain = model.tower.before
    try:
        with caplog.at_level("WARNING"):
            engine.warm_up("on")
    finally:
        torch.compiler.set_stance("default")
        assert engine.close()
    assert not caplog.records
    assert model.tower.before is not plain
    assert engine._scratch.steps is not None


def test_a_step_that_would_wait_for_the_device_is_given_up_before_it_is_captured(tmp_path, caplog):
    write_checkpoint(tmp_path, "qwen2_5_vl")
    model = load_model(str(tmp_path), dtype="float32", device="cuda")
    plain = model.language.after

    def waiting(x, attended, weights):
        return plain(x, attended, weights) * float(x.isfinite().all())

    model.language.after = waiting
    scratch = Scratch(model.kv_shape, 2, 256)
    scratch.capture_steps(model)
    assert scratch.steps is None
    assert "synchronizing" in caplog.text
    model.language.after = plain
    scratch.capture_steps(model)
    assert scratch.steps is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_questions_between_the_layers_of_chunks_leave_no_trace(dtype, tmp_path, rng):
    """Captured steps run in the middle of chunks, whose pictures came ahead on a stream of their own."""
    write_checkpoint(tmp_path, "qwen2_5_vl")
    model = load_model(str(tmp_path), dtype=dtype, device="cuda")
    engine = Engine(model, max_concurrent_questions=4, scratch_tokens=256)
    engine.warm_up("off")
    engine.start()
    try:
        chunks = [_chunk(rng, first) for first in range(0, 160, 4)]
        rows = {}
        for name in ("alone", "asked"):
            engine.add_stream(StreamOptions(name, memory_bytes=1 << 24)).result(60)
            engine.encode(name, chunks[0]).result(60)
            encodings = [engine.encode(name, chunk) for chunk in chunks[1:]]
            questions = []
            while name == "asked" and not encodings[-1].done():
                ask = Ask(stream=name, question=f"What is it? {len(questions)}", max_new_tokens=8)
                questions.append(engine.ask(ask, arrived=time.monotonic()))
                questions[-1].result(60)
            assert all(encoding.result(60).num_tokens for encoding in encodings)
            assert all(question.result(60).memory.unchanged for question in questions)
            memory = engine._memories[name]
            extent = memory.extent(memory.now)
            rows[name] = [part.cpu() for layer in range(extent.arena.shape.num_layers) for part in extent.rows(layer)]
        assert len(questions) > 2 and engine._scratch.steps is not None
        assert all(torch.equal(a, b) for a, b in zip(rows["alone"], rows["asked"], strict=True))
    finally:
        assert engine.close()


def test_pictures_that_come_ahead_are_those_of_their_chunk(rng):
    device = torch.device("cuda", 0)
    uploader = Uploader(device)
    chunks = [_chunk(rng, first, (1080, 1920)) for first in range(0, 24, 4)]
    ahead = uploader.start(chunks[0])
    for chunk, after in zip(chunks, [*chunks[1:], None], strict=True):
        pixels = ahead.pixels()
        torch.cuda._sleep(50_000_000)  # the device is behind while the next one's pictures come
        if after is not None:
            ahead = uploader.start(after)
        seen = pixels.clone()
        del pixels
        assert (seen.cpu().numpy() == [picture.pixels for picture in chunk.pictures]).all()
    uploader.close()


def test_the_host_stays_a_few_steps_ahead_of_the_device():
    pace = Pace(torch.device("cuda", 0))
    ends = []
    for _ in range(8):
        torch.cuda._sleep(20_000_000)
        end = torch.cuda.Event()
        end.record()
        pace.keep()
        ends.append(end)
        assert all(end.query() for end in ends[:-4]) and not ends[-1].query()


def _chunk(rng, first, size=(112, 168)):
    shape = (*size, 3)
    return Chunk(
        tuple(
            Picture(rng.integers(0, 256, shape, dtype="uint8"), i, i * 10**8, "media", i * 10**8)
            for i in range(first, first + 4)
        )
    )


@pytest.fixture
def rng():
    import numpy

    return numpy.random.default_rng(0)
