"""Every mistake in a configuration is named; every setting is explained."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from onlooker.node.__main__ import main
from onlooker.node.config import ConfigError, NodeConfig, Stream, load, parse_setting
from onlooker.node.config_text import config_text
from onlooker.node.options import StreamOptions
from onlooker.protocol.errors import NodeError
from onlooker.protocol.messages import StreamSpec

SHIPPED = Path(__file__).parent.parent / "launch" / "node.toml"
EXPOSED = {"endpoints.ask": "tcp://0.0.0.0:5560"}


def written(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text))
    return [problem.partition("node.toml: ")[2] for problem in caught.value.problems]


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, name)


def test_the_shipped_file_holds_the_defaults():
    assert load(SHIPPED) == NodeConfig()


def test_the_shipped_file_is_the_one_that_is_made(capsys: pytest.CaptureFixture[str]):
    assert SHIPPED.read_text() == config_text()
    assert main(["--print-config"]) == 0
    assert capsys.readouterr().out == config_text()


def test_the_shipped_file_explains_every_setting():
    """A setting is there with its default, or commented out if it has none; each with a comment."""
    text, values = SHIPPED.read_text(), tomllib.loads(SHIPPED.read_text())
    tables = dict(re.findall(r"(?ms)^\[(\w+)\](.*?)(?=^\[|\Z)", text)) | {"": text.partition("\n[")[0]}
    for prefix, model in sections(NodeConfig):
        for name in model.model_fields:
            if prefix == "" and (name in tables or name == "streams"):
                continue
            assert re.search(rf"(?m)^(# )?{name} = .+ # \S", tables[prefix]), f"{prefix}.{name} is not explained"
        for name, value in (values[prefix] if prefix else values).items():
            assert isinstance(value, dict) or name in model.model_fields


def test_what_is_commented_out_in_the_shipped_file_would_work(tmp_path: Path):
    text = re.sub(r"(?m)^# (\w+ = |\[\[)", r"\1", SHIPPED.read_text())
    config = load(written(tmp_path, text), {"security.curve": "required"})
    assert config.name == "gate"
    assert config.streams[0].connect == "tcp://192.168.1.20:5555"
    assert config.stream_options(config.streams[0]).encode_size == (640, 360)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("modle = 'x'", "modle: unknown key; did you mean model?"),
        ("questions.max_waitng = 3", "questions.max_waitng: unknown key; did you mean max_waiting?"),
        ("[[streams]]\nname = 'a'\nfpss = 1", "streams[0].fpss: unknown key; did you mean fps?"),
        ("zzz = 1", "zzz: unknown key; known are name, model"),
        ("questions.max_waiting = 0", "questions.max_waiting: input should be greater than or equal to 1, got 0"),
        ("questions.max_waiting = true", "questions.max_waiting: must be a number, not true or false, got True"),
        ("questions.default_deadline_s = -1", "questions.default_deadline_s: input should be greater than 0"),
        ("questions.default_deadline_s = nan", "questions.default_deadline_s: "),
        ("questions.scratch_tokens = 63", "questions.scratch_tokens: input should be greater than or equal to 64"),
        ("questions = 3", "questions: "),
        ("limits.max_streams = 0", "limits.max_streams: input should be greater than or equal to 1, got 0"),
        ("limits.max_memory_bytes = 'much'", "limits.max_memory_bytes: "),
        (
            "limits.max_streams = 1\n[[streams]]\nname = 'a'\n[[streams]]\nname = 'b'",
            "limits.max_streams: must be at least 2, for that many streams, got 1",
        ),
        (
            "limits.max_memory_bytes = 10\n[[streams]]\nname = 'a'\nmemory_bytes = 9\nmin_memory_bytes = 6\n"
            "[[streams]]\nname = 'b'\nmemory_bytes = 5",
            "limits.max_memory_bytes: must be at least 11 (11 B), for all streams, got 10 B",
        ),
        ("dtype = 'float64'", "dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'float64'"),
        ("device = 'tpu'", "device: must be auto, cpu, cuda, cuda:N or balanced, got 'tpu'"),
        ("name = 'a b'", "name: "),
        ("endpoints.ask = 'localhost'", "endpoints.ask: must be tcp://host:port"),
        ("endpoints.ask = 'tcp://127.0.0.1:65536'", "endpoints.ask: must be tcp://host:port"),
        (f"endpoints.ask = 'ipc://{'x' * 108}'", "endpoints.ask: an ipc path is at most 107 bytes long"),
        ("endpoints.ask = 'tcp://127.0.0.1:5561'", "endpoints: tcp://127.0.0.1:5561 is given to two sockets"),
        (
            "endpoints.ask = 'tcp://0.0.0.0:5560'",
            "endpoints.ask: tcp://0.0.0.0:5560 can be reached from other machines",
        ),
        ("endpoints.frames = 'tcp://*:5556'", "endpoints.frames: tcp://*:5556 can be reached from other machines"),
        ("security.curve = 'required'", 'security: server_key is needed when curve = "required"'),
        ("stream_defaults.chunk_frames = 3", "stream_defaults.chunk_frames: must be one of 1, 2, 4, 6, 8, got 3"),
        ("[[streams]]\nfps = 1.0", "streams[0].name: Field required"),
        ("[[streams]]\nname = 'a'\n[[streams]]\nname = 'a'", "streams[1] (a): another stream has this name"),
        (
            "[[streams]]\nname = 'a'\nmin_pixels = 9\nmax_pixels = 4",
            "streams[0] (a): min_pixels 9 is above max_pixels 4",
        ),
        ("[[streams]]\nname = 'a'\nconnect = 'tcp://h:*'", "streams[0].connect: a port to connect to is needed"),
        ("log.level = 'loud'", "log.level: input should be 'debug', 'info', 'warning' or 'error', got 'loud'"),
        ("model = ", "Invalid value"),
    ],
)
def test_a_mistake_is_reported_by_its_key(tmp_path: Path, text: str, problem: str):
    found = problems(tmp_path, text)
    assert any(line.startswith(problem) for line in found), found


def test_all_mistakes_are_reported_together(tmp_path: Path):
    assert len(problems(tmp_path, "modle = 'x'\ndtype = 'x'\n[questions]\nmax_waiting = 0")) == 3


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: No such file"):
        load(tmp_path / "nowhere.toml")


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, "model = 'file'\n[questions]\nmax_waiting = 2\nmax_options = 3\nmax_concurrent = 4")
    monkeypatch.setenv("ONLOOKER_QUESTIONS__MAX_OPTIONS", "5")
    monkeypatch.setenv("ONLOOKER_QUESTIONS__MAX_CONCURRENT", "6")
    questions = load(path, {"questions.max_concurrent": 7}).questions
    assert (questions.max_waiting, questions.max_options, questions.max_concurrent) == (2, 5, 7)


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("ONLOOKER_MODLE", "x", "ONLOOKER_MODLE: unknown key; did you mean model?"),
        ("ONLOOKER_QUESTIONS__MAX_WAITNG", "3", "questions.max_waitng: unknown key; did you mean max_waiting?"),
        ("ONLOOKER_QUESTIONS__MAX_WAITING", "many", "questions.max_waiting: "),
        ("ONLOOKER_STREAMS", "front", "environment: "),
    ],
)
def test_a_mistake_in_the_environment_is_reported(monkeypatch: pytest.MonkeyPatch, variable, value, problem):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load()


def test_nothing_can_be_changed_afterwards():
    config = load()
    for section, key in ((config, "model"), (config.questions, "max_waiting")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, getattr(section, key))


def test_insecure_has_to_be_said():
    assert load(None, EXPOSED | {"security.insecure": True}).exposed_endpoints() == {"ask": "tcp://0.0.0.0:5560"}
    keys = {"security.server_key": "k", "security.client_keys": "c", "security.curve": "required"}
    assert load(None, EXPOSED | keys).security.curve == "required"


def test_streams_are_added_by_name_once():
    config = load(None, {"streams": [{"name": "a", "fps": 2.0}]}, streams=["b", "a", "b"])
    assert [stream.name for stream in config.streams] == ["a", "b"]
    assert config.streams[0].fps == 2.0


def test_a_stream_follows_the_defaults_where_it_says_nothing():
    config = load(None, {"stream_defaults.fps": 4.0, "stream_defaults.memory_bytes": "2MiB"}, streams=["a"])
    assert config.stream_options(config.streams[0]) == StreamOptions(name="a", fps=4.0, memory_bytes=2 << 20)
    spec = StreamSpec(stream="b", stride=2, encode_width=64, encode_height=32)
    assert config.spec_options(spec) == StreamOptions(
        name="b", fps=4.0, stride=2, encode_size=(64, 32), memory_bytes=2 << 20
    )


def test_the_defaults_of_streams_are_the_same_everywhere():
    assert load(None, streams=["a"]).stream_options(Stream(name="a")) == StreamOptions(name="a")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (StreamSpec(stream="a", chunk_frames=3), "chunk_frames: must be one of"),
        (StreamSpec(stream="a", connect="camera"), "connect: must be tcp://host:port"),
        (StreamSpec(stream="a", connect="ipc:///run/secret"), "connect: must be tcp://host:port over the wire"),
        (StreamSpec(stream="a", connect="ipc://@abstract"), "connect: must be tcp://host:port over the wire"),
        (StreamSpec(stream="a", encode_height=3), "encode_width and encode_height go together"),
        (StreamSpec(stream="a", min_pixels=5, max_pixels=4), "min_pixels 5 is above max_pixels 4"),
    ],
)
def test_a_stream_asked_for_over_the_wire_is_checked(spec: StreamSpec, message: str):
    with pytest.raises(NodeError, match=message) as caught:
        load().spec_options(spec)
    assert caught.value.code == "BAD_REQUEST"


@pytest.mark.parametrize(
    "settings",
    [
        {"stream_defaults.camera_key": "a.key"},
        {"streams": [{"name": "a", "connect": "tcp://10.0.0.5:5555", "camera_key": "a.key"}]},
    ],
)
def test_without_curve_a_key_of_a_camera_is_refused_and_not_passed_over(settings: dict[str, object]):
    with pytest.raises(ConfigError, match=r'camera_key: .* only when security.curve = "required"'):
        load(None, settings)


def test_the_operator_may_name_a_camera_of_this_machine():
    config = load(None, {"streams": [{"name": "a", "connect": "ipc:///run/camera"}]})
    assert config.stream_options(config.streams[0]).connect == "ipc:///run/camera"


def test_with_curve_a_camera_is_connected_only_by_its_key():
    keys = {"security.server_key": "k", "security.client_keys": "c", "security.curve": "required"}
    with pytest.raises(NodeError, match="camera_key"):
        load(None, keys).spec_options(StreamSpec(stream="a", connect="tcp://10.0.0.5:5555"))
    stream = {"name": "a", "connect": "tcp://10.0.0.5:5555", "camera_key": "a.key"}
    config = load(None, keys | {"streams": [stream]})
    assert config.stream_options(config.streams[0]).camera_key == "a.key"


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("questions.max_waiting=8", ("questions.max_waiting", 8)),
        ("stream_defaults.fps = 2.5", ("stream_defaults.fps", 2.5)),
        ("endpoints.ask=tcp://127.0.0.1:*", ("endpoints.ask", "tcp://127.0.0.1:*")),
        ("model=Qwen/Qwen2.5-VL-3B-Instruct", ("model", "Qwen/Qwen2.5-VL-3B-Instruct")),
        ("security.insecure=true", ("security.insecure", True)),
        ("stream_defaults.encode_size=[64, 32]", ("stream_defaults.encode_size", [64, 32])),
        ("model=a=b", ("model", "a=b")),
    ],
)
def test_a_setting_on_the_command_line_is_toml_or_plain_text(text: str, setting: tuple[str, object]):
    assert parse_setting(text) == setting


@pytest.mark.parametrize("text", ["model", "=x", ""])
def test_what_is_no_setting_is_refused(text: str):
    with pytest.raises(ConfigError, match="is not key=value"):
        parse_setting(text)


@pytest.mark.parametrize("size", ["2MiB and some", "1GB and more", "2MiB/s", "1,5 MiB", "1.5.2MiB", "lots", True])
def test_a_size_is_read_whole_or_not_at_all(size: object):
    with pytest.raises(ConfigError) as caught:
        load(None, {"stream_defaults.memory_bytes": size})
    (problem,) = caught.value.problems
    assert problem.startswith("stream_defaults.memory_bytes: ") and problem.endswith(f"got {size!r}")


@pytest.mark.parametrize(("size", "expected"), [("2MiB", 2 << 20), ("1.5 GB", 1_500_000_000), ("4096", 4096), (7, 7)])
def test_a_size_has_a_unit_or_is_bytes(size: object, expected: int):
    assert load(None, {"stream_defaults.memory_bytes": size}).stream_defaults.memory_bytes == expected


def test_what_was_given_is_said_once():
    with pytest.raises(ConfigError) as caught:
        load(None, streams=["front door"])
    (problem,) = caught.value.problems
    assert problem.count("front door") == 1


def test_what_a_full_memory_does_is_a_setting_of_the_node_and_of_each_stream():
    config = load(overrides={"stream_defaults.retention": "window"})
    assert config.spec_options(StreamSpec(stream="front")).retention == "window"
    assert config.spec_options(StreamSpec(stream="front", retention="thin")).retention == "thin"
    assert load().spec_options(StreamSpec(stream="front")).retention == "stop"
    with pytest.raises(ConfigError, match=r"stream_defaults\.retention"):
        load(overrides={"stream_defaults.retention": "never"})


def test_last_frames_follow_the_defaults_unless_a_stream_says_otherwise():
    config = load(overrides={"stream_defaults.last_frames": 8})
    assert config.spec_options(StreamSpec(stream="front")).last_frames == 8
    assert config.spec_options(StreamSpec(stream="front", last_frames=0, retention="thin")).last_frames == 0
    with pytest.raises(NodeError, match="needs retention stop") as refused:
        config.spec_options(StreamSpec(stream="front", retention="thin"))
    assert refused.value.code == "BAD_REQUEST"


def test_gate_and_drop_follow_the_defaults_unless_a_stream_says_otherwise():
    config = load(overrides={"stream_defaults.gate": 10, "stream_defaults.drop": 0.9})
    defaults = config.spec_options(StreamSpec(stream="front"))
    assert (defaults.gate, defaults.drop) == (10.0, 0.9)
    own = config.spec_options(StreamSpec(stream="front", gate=0, drop=1))
    assert (own.gate, own.drop) == (0.0, 1.0)
    off = load().spec_options(StreamSpec(stream="front"))
    assert (off.gate, off.drop) == (None, None)
    for mistake in ({"gate": 256}, {"gate": -1}, {"drop": 1.1}, {"drop": True}):
        ((key, value),) = mistake.items()
        with pytest.raises(ConfigError, match=rf"stream_defaults\.{key}"):
            load(overrides={f"stream_defaults.{key}": value})


def test_a_stream_that_asks_for_less_than_the_least_by_default_is_guaranteed_what_it_asks_for():
    config = load(None, {"stream_defaults.min_memory_bytes": "2MiB", "stream_defaults.memory_bytes": "4MiB"})
    assert config.spec_options(StreamSpec(stream="a", memory_bytes=1 << 20)).guaranteed_bytes == 1 << 20
    assert config.spec_options(StreamSpec(stream="a")).guaranteed_bytes == 2 << 20
    with pytest.raises(NodeError, match="min_memory_bytes 2097152 is above memory_bytes 1048576"):
        config.spec_options(StreamSpec(stream="a", memory_bytes=1 << 20, min_memory_bytes=2 << 20))
