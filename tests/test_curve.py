import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.auth

from onlooker.protocol.curve import (
    KeyPair,
    become_server,
    generate,
    load_credentials,
    load_keypair,
    load_public,
    write_keypair,
)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> Iterator[None]:
    """The most careless umask there is: only the mode given at creation counts."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_pair_is_written_and_read_again(tmp_path: Path) -> None:
    pair = generate()
    public, secret = write_keypair(tmp_path, "node", pair)
    assert (public.name, secret.name) == ("node.key", "node.key_secret")
    assert load_keypair(secret) == pair
    assert load_public(public) == load_public(secret) == pair.public


def test_the_secret_file_is_its_owners_alone_under_any_umask(tmp_path: Path, open_umask: None) -> None:
    public, secret = write_keypair(tmp_path / "keys", "node", generate())
    assert (_mode(public), _mode(secret)) == (0o644, 0o600)
    assert _mode(tmp_path / "keys") == 0o700


def test_the_secret_file_is_created_narrow_and_never_narrowed(
    tmp_path: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[tuple[str, int]] = []
    real_open = os.open

    def noting(path: os.PathLike[str], flags: int, mode: int = 0o777, **more: int) -> int:
        descriptor = real_open(path, flags, mode, **more)
        created.append((Path(path).name, _mode(Path(path))))
        return descriptor

    monkeypatch.setattr(os, "open", noting)
    write_keypair(tmp_path, "node", generate())
    assert created == [("node.key_secret", 0o600), ("node.key", 0o644)]


def test_the_zmq_tools_read_our_files_and_we_read_theirs(tmp_path: Path) -> None:
    pair = generate()
    public, secret = write_keypair(tmp_path, "ours", pair)
    assert zmq.auth.load_certificate(secret) == (pair.public, pair.secret)
    assert zmq.auth.load_certificate(public) == (pair.public, None)
    zmq.auth.create_certificates(tmp_path, "theirs")
    (tmp_path / "theirs.key_secret").chmod(0o600)
    theirs = load_keypair(tmp_path / "theirs.key_secret")
    assert theirs.public == load_public(tmp_path / "theirs.key")


@pytest.mark.parametrize("existing", ["node.key", "node.key_secret"])
def test_keys_that_exist_are_never_written_over(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(FileExistsError):
        write_keypair(tmp_path, "node", generate())
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o620, 0o601])
def test_a_secret_file_that_others_may_touch_is_refused_with_its_mode(tmp_path: Path, mode: int) -> None:
    _, secret = write_keypair(tmp_path, "node", generate())
    secret.chmod(mode)
    with pytest.raises(ValueError, match=f"{mode:04o}"):
        load_keypair(secret)


def test_a_secret_file_that_even_its_owner_cannot_write_is_fine(tmp_path: Path) -> None:
    pair = generate()
    _, secret = write_keypair(tmp_path, "node", pair)
    secret.chmod(0o400)
    assert load_keypair(secret) == pair


@pytest.mark.parametrize(
    "text",
    ["", "curve\n", 'public-key = "short"\n', f'public-key = "{"~" * 40}"\n', f'public-key = "{"ä" * 40}"\n', "\0\xff"],
)
def test_a_file_that_holds_no_key_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.key"
    path.write_text(text)
    path.chmod(0o600)
    for load in (load_public, load_keypair):
        with pytest.raises(ValueError, match=r"node\.key"):
            load(path)


def test_a_public_file_is_no_pair(tmp_path: Path) -> None:
    public, _ = write_keypair(tmp_path, "node", generate())
    public.chmod(0o600)
    with pytest.raises(ValueError, match="no secret key"):
        load_keypair(public)


def test_keys_that_are_not_a_pair_are_refused(tmp_path: Path) -> None:
    mixed = KeyPair(generate().public, generate().secret)
    _, secret = write_keypair(tmp_path, "node", mixed)
    with pytest.raises(ValueError, match="not a pair"):
        load_keypair(secret)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for load in (load_public, load_keypair):
        with pytest.raises(FileNotFoundError, match=r"absent\.key"):
            load(tmp_path / "absent.key")


def test_a_public_key_alone_makes_neither_a_file_nor_a_server(tmp_path: Path) -> None:
    public = KeyPair(generate().public)
    with pytest.raises(ValueError, match="secret key"):
        write_keypair(tmp_path, "node", public)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket, pytest.raises(ValueError, match="secret"):
        become_server(socket, public)
    assert list(tmp_path.iterdir()) == []


def test_a_secret_is_never_shown() -> None:
    pair = generate()
    assert pair.secret is not None
    assert pair.secret.decode() not in repr(pair)


def test_credentials_are_two_files_or_none(tmp_path: Path) -> None:
    server, own = generate(), generate()
    server_key, _ = write_keypair(tmp_path, "server", server)
    _, client_key = write_keypair(tmp_path, "own", own)
    credentials = load_credentials(server_key, client_key)
    assert credentials is not None
    assert (credentials.server_public, credentials.pair) == (server.public, own)
    assert load_credentials(None, None) is None
    for given in ((server_key, None), (None, client_key)):
        with pytest.raises(ValueError, match="together"):
            load_credentials(*given)


def test_keys_may_be_named_by_strings(tmp_path: Path) -> None:
    public, _ = write_keypair(tmp_path, "node", generate())
    _, secret = write_keypair(tmp_path, "camera", generate())
    assert load_credentials(str(public), str(secret)) == load_credentials(public, secret)
