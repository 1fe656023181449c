from collections import Counter

import pytest
from apache_beam.coders import StrUtf8Coder, TupleCoder, VarIntCoder

from beam_pipelines.kernels.key_groups import (
    MAX_PARALLELISM,
    even_labels,
    key_group,
    shard_labels,
    varint,
)

# Encoded key → its key group of 128, as told by Beam's FlinkKey and Flink's
# KeyGroupRangeAssignment themselves (Beam 2.70, Flink 1.19.3). All lengths of a tail of
# MurmurHash3 are there, and bytes that are negative in Java.
KNOWN = {
    "": 94,
    "00": 46,
    "01": 122,
    "7f": 62,
    "ff": 63,
    "80": 72,
    "0430": 30,
    "00000000": 71,
    "0102030405060708": 39,
    "ffffffffffffffff": 73,
    "0b302f342f3132333435363738": 73,
    "8c210d": 51,
    "b1a7e7e849": 48,
    "7a2365ff83dd": 119,
    "878c62d4332819": 2,
    "364d03868055d669c0": 36,
    "aee9f919449d04a71089": 72,
    "d676a950fe386fca0e3f98": 66,
    "e98ee81edf7fae40bfe793d9": 29,
    "0b90b6a1c10664c1f1c60aa67684": 26,
    "8fdc0c118766183de8be0ece0c238b": 122,
    "a5625bb2908d5797d3ee74dc52131517": 15,
    "d80bf81599b967c45a7e894825be9b342d": 68,
    "847891d75da8ddddc46434afeb50781ae043": 64,
    "13623633bb121722057ac93a54039badc22557": 103,
    "95b0180a98eba8fce9bf8a819b01f5529ebc20ef": 114,
    "b862706883216d7aac286f32aa3655aa684e0f8507": 115,
    "324f0aec09395a3213018ebde232b69b463dffe94c73": 117,
    "7eab79470ba3c885b66c499800da641a22a420ee9989ec": 90,
    "33c5a1310869b0474ae6d3bd50c01476b38cd8a4392e8203": 93,
    "4458f607a90e1aa114a0e7943cf59d55333cfac7b25a9c59c2": 48,
    "a6a46d99364cf461b317c99fee614cc5a74b029f8f814e38d939": 69,
    "a1dab75dd2633196fb8d3ab82018f5eb9e085d4c705162ef6f5706": 73,
    "8149d75ec068d84f1eecd995dd68a971e68488f0b4498218d07e4784": 45,
    "65e240a4e944b31d0705e6c8b71cf8bdfc97c696693058b22edd1479f1": 122,
    "19b7f5a6979c2cae5d284d8cdd1ab55c7ac6224fb5ca31a4acfff8c32be1": 104,
    "01b24847eafa8ebbfe41e1be58c9936f70570198736d008963a7f2f0c00be3": 17,
    "013be4143043585c2e676c61aa18c6a1e512f455aa86d26b198c576e4a1e9fbc": 17,
    "7fd25af2510431a69e8300a294d496df079387e5f3cea4725329c2bffb7e8edf33": 57,
}


@pytest.mark.parametrize(("key", "group"), KNOWN.items())
def test_a_key_falls_into_the_group_that_flink_gives_it(key, group):
    assert key_group(bytes.fromhex(key)) == group


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**31, 2**62, 2**63 - 1, -1, -(2**63)])
def test_ints_are_encoded_as_beam_does(value):
    assert varint(value) == VarIntCoder().encode(value)


def subtasks(groups, parallelism):
    """Return how many keys each subtask gets: Flink's computeOperatorIndexForKeyGroup."""
    found = Counter(group * parallelism // MAX_PARALLELISM for group in groups)
    return [found[i] for i in range(parallelism)]


def test_plain_numbers_fall_unevenly():
    assert subtasks([key_group(varint(i)) for i in range(16)], 4) == [5, 4, 4, 3]


@pytest.mark.parametrize("parallelism", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("beside", [(), (0,), (7, -3)])
def test_shards_fall_evenly_on_the_subtasks(parallelism, beside):
    labels = shard_labels(16, *beside)
    key = TupleCoder([VarIntCoder()] * (1 + len(beside)))
    keys = [key.encode((label, *beside)) if beside else varint(label) for label in labels]
    assert len(set(labels)) == 16
    assert subtasks(map(key_group, keys), parallelism) == [16 // parallelism] * parallelism


def test_a_label_falls_into_its_part():
    def encode(label):
        return StrUtf8Coder().encode(f"reader {label}")

    labels = even_labels(encode, 5)
    assert [key_group(encode(label)) * 5 // MAX_PARALLELISM for label in labels] == [0, 1, 2, 3, 4]
