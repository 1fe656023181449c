import pickle

import pytest

from beam_pipelines.model.secret import MissingSecret, Secret

URL = "postgresql://me:hunter2@db/activity"


def test_a_variable_holds_the_secret(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", URL)
    assert Secret("env:DATABASE_URL").resolve() == URL


def test_it_is_looked_up_anew_each_time(monkeypatch):
    secret = Secret("env:DATABASE_URL")
    monkeypatch.setenv("DATABASE_URL", "old")
    assert secret.resolve() == "old"
    monkeypatch.setenv("DATABASE_URL", "new")
    assert secret.resolve() == "new"


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"hunter2", "hunter2"),
        (b"hunter2\n", "hunter2"),
        (b"hunter2\r\n", "hunter2"),
        (b"hunter2\n\n", "hunter2\n"),
        (b" h\xc3\xbcnter2 \n", " hünter2 "),
    ],
)
def test_a_file_holds_the_secret_and_one_newline_at_its_end_is_not_part_of_it(
    tmp_path, content, secret
):
    path = tmp_path / "url"
    path.write_bytes(content)
    assert Secret(f"file:{path}").resolve() == secret


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with pytest.raises(MissingSecret, match="environment variable DATABASE_URL is not set"):
        Secret("env:DATABASE_URL").resolve()


def test_a_file_that_is_missing_or_no_file_is_named(tmp_path):
    with pytest.raises(MissingSecret, match=rf"{tmp_path}/url can't be read \(No such file"):
        Secret(f"file:{tmp_path}/url").resolve()
    with pytest.raises(MissingSecret, match=rf"{tmp_path} can't be read \(Is a directory"):
        Secret(f"file:{tmp_path}").resolve()


def test_what_is_empty_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("DATABASE_URL", "")
    (tmp_path / "url").write_text("\n")
    for reference in ("env:DATABASE_URL", f"file:{tmp_path}/url"):
        with pytest.raises(MissingSecret, match=f"^the secret {reference} is empty$"):
            Secret(reference).resolve()


def test_a_file_of_other_bytes_is_refused_without_showing_them(tmp_path):
    (tmp_path / "url").write_bytes(b"hunter2\xff")
    with pytest.raises(MissingSecret, match=r"url is not UTF-8 text$") as refused:
        Secret(f"file:{tmp_path}/url").resolve()
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        URL,
        "hunter2",
        "env:",
        "file:",
        "ENV:NAME",
        f"env:{URL}",
        "env:1NAME",
        "env:NAME\n",
        "file:\0",
        " env:NAME",
    ],
)
def test_anything_else_is_refused_without_showing_it(value):
    with pytest.raises(ValueError, match="env:NAME or file:PATH") as refused:
        Secret(value)
    assert str(refused.value) == (
        "a secret is given as env:NAME or file:PATH, the environment variable or file that "
        "holds it; this is neither, and not shown, as it may be the secret itself"
    )


def test_it_travels_and_shows_as_its_reference(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", URL)
    secret = Secret("env:DATABASE_URL")
    secret.resolve()
    assert repr(secret) == "Secret(reference='env:DATABASE_URL')"
    assert b"hunter2" not in pickle.dumps(secret)
    assert pickle.loads(pickle.dumps(secret)) == secret
