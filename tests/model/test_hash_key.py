import pickle

import pytest

from beam_pipelines.model.hash_key import HashKey, key_of
from beam_pipelines.model.secret import MissingSecret


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("KEY", "0123456789abcdef")


def test_a_key_of_any_length_gives_as_many_bytes(monkeypatch):
    keys = []
    for length in (16, 17, 64, 1000):
        monkeypatch.setenv("KEY", "x" * length)
        keys.append(HashKey.look_up("env:KEY").resolve())
    assert {len(key) for key in keys} == {32}
    assert len(set(keys)) == 4


def test_a_file_holds_a_key_as_well(tmp_path):
    (tmp_path / "key").write_text("0123456789abcdef\n")
    in_file, variable = HashKey.look_up(f"file:{tmp_path}/key"), HashKey.look_up("env:KEY")
    assert in_file.fingerprint == variable.fingerprint
    assert in_file.resolve() == variable.resolve()


def test_what_travels_is_the_reference_and_the_fingerprint():
    travelled = pickle.dumps(HashKey.look_up("env:KEY"))
    assert b"0123456789abcdef" not in travelled
    assert HashKey.look_up("env:KEY").resolve() not in travelled
    assert pickle.loads(travelled) == HashKey.look_up("env:KEY")


def test_a_worker_with_another_key_is_refused(monkeypatch):
    key = HashKey.look_up("env:KEY")
    monkeypatch.setenv("KEY", "fedcba9876543210")
    with pytest.raises(MissingSecret, match="env:KEY holds a key of fingerprint") as error:
        key.resolve()
    assert f"was started with {key.fingerprint}" in str(error.value)
    assert "fedcba9876543210" not in str(error.value)


def test_a_short_key_is_refused_and_bytes_count(monkeypatch):
    monkeypatch.setenv("KEY", "ü" * 8)
    HashKey.look_up("env:KEY")
    monkeypatch.setenv("KEY", "x" * 15)
    with pytest.raises(ValueError, match=r"has 15 bytes, fewer than 16.*openssl rand -hex 32"):
        HashKey.look_up("env:KEY")


def test_without_a_key_there_are_no_bytes():
    assert key_of(None) == b""
