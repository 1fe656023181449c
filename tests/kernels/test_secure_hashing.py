import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels import secure_hashing
from beam_pipelines.kernels.secure_hashing import RepeatedHashes, secure_hashes
from tests.murmur import texts_of, twin_of

TEXTS = st.lists(st.one_of(st.none(), st.sampled_from(["", "a", "b", "ab"]), st.text()))
KEYS = st.binary(max_size=64)


def naive(text, key=b"", purpose=b"", beside=b""):
    data = (text or "").encode() + beside
    digest = hashlib.blake2b(data, digest_size=8, key=key, person=purpose).digest()
    return int.from_bytes(digest, "little")


@given(TEXTS, KEYS, st.binary(max_size=16))
def test_a_hash_is_that_of_blake2b(texts, key, purpose):
    expected = [naive(text, key, purpose) for text in texts]
    column = pa.array(["x", *texts], pa.string()).slice(1)
    assert secure_hashes(column, key, purpose).tolist() == expected
    assert secure_hashes(column.cast(pa.binary()), key, purpose).tolist() == expected
    remembering = RepeatedHashes(key, purpose)
    assert remembering(column).tolist() == expected
    assert remembering(column).tolist() == expected


@pytest.mark.parametrize("beside", [np.array([-1, 5]), np.array([2**64 - 1, 5], np.uint64)])
def test_a_value_beside_the_text_is_hashed_after_it(beside):
    expected = [naive("a", b"k", beside=b"\xff" * 8), naive(None, b"k", beside=b"\5" + bytes(7))]
    assert secure_hashes(pa.array(["a", None]), b"k", beside=beside).tolist() == expected


def test_texts_of_one_murmur_hash_have_hashes_of_their_own():
    texts = ["ann", twin_of("ann"), "ann", *texts_of([7] * 100)]
    hashes = RepeatedHashes()(pa.array(texts)).tolist()
    assert hashes == [naive(text) for text in texts]
    assert len(set(hashes)) == len(set(texts)) == 102


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(secure_hashing, "_REMEMBERED", 3)
    remembering = RepeatedHashes()
    for texts in (["a", "b"], ["b", "c", "d"], ["e" * 65, "b", "a"], list("abcdefgh")):
        assert remembering(pa.array(texts)).tolist() == [naive(text) for text in texts]
        assert len(remembering._known) <= 3
        assert max(map(len, remembering._known), default=0) <= 64
