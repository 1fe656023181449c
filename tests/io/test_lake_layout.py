import itertools
import random

import pytest

from beam_pipelines.io.lake.layout import (
    EIGHTHS,
    Range,
    eighth,
    eighth_of,
    open_files,
    open_name,
    published_name,
    to_read,
)

DAY = 20_000  # 2024-10-04
A = Range("orders", 0, 0, 100_000)
B = Range("orders", 0, 100_000, 200_000)
C = Range("日本", 12, 1_000_000_000_000, 1_000_000_100_000)


def chosen(*names):
    """What is read, whatever order the names are listed in."""
    shuffled = list(names)
    results = set()
    for seed in range(10):
        random.Random(seed).shuffle(shuffled)
        results.add(tuple(to_read(shuffled)))
    (result,) = results
    return list(result)


@pytest.mark.parametrize("of", [A, B, C])
def test_a_published_file_goes_before_an_open_one_of_its_range_and_date(of):
    published = published_name(of, DAY)
    opened = [open_name(of, DAY, of.start + 5, end) for end in (of.end - 1, of.end)]
    assert chosen(published, *opened) == [published]


@pytest.mark.parametrize("of", [A, B, C])
def test_of_open_files_the_one_that_covers_most_is_read(of):
    names = [open_name(of, DAY, of.start, of.start + covered) for covered in (9, 10, 99)]
    assert chosen(*names) == names[2:]


@pytest.mark.parametrize("of", [A, B, C])
def test_eighths_are_read_beside_each_other(of):
    borders = [of.start, of.start + 12_500, of.start + 25_000]
    names = [open_name(of, DAY, start, end) for start, end in itertools.pairwise(borders)]
    shorter = open_name(of, DAY, borders[1], borders[1] + 1)
    assert chosen(*names, shorter) == sorted(names)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 10, 99_999, 100_000])
def test_eighths_of_a_range_follow_each_other(length):
    of = Range("orders", 0, 70, 70 + length)
    parts = [eighth(number, of) for number in range(EIGHTHS)]
    assert [start for start, _ in parts] == [of.start, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == of.end
    assert max(end - start for start, end in parts) == -(-length // EIGHTHS)
    for number, (start, end) in enumerate(parts):
        for offset in {start, end - 1} if start < end else ():
            assert eighth_of(offset, of) == number


def test_numbers_of_more_digits_are_larger():
    far = Range("t", 0, 999_999_900_000, 1_000_000_000_000)
    ends = (999_999_999_999, 1_000_000_000_000)
    names = [open_name(far, DAY, 999_999_987_500, end) for end in ends]
    assert chosen(*names) == names[1:]


def test_dates_and_ranges_are_apart():
    names = [published_name(A, DAY), open_name(A, DAY + 1, 0, 5)]
    names.append(open_name(B, DAY, B.start, 100_005))
    assert chosen(*names) == sorted(names)


def test_what_isnt_the_lakes_is_left_out():
    assert (
        chosen(
            "notes.parquet",
            "event_date=2024-10-04/notes.parquet",
            f"event_date=2024-10-04/{A.name}.parquet.crc",
            f"_open/{published_name(A, DAY)}",
        )
        == []
    )


def test_open_files_of_a_range_come_by_date_and_eighth_with_the_longest_first():
    names = [open_name(A, DAY, 0, 5), open_name(A, DAY, 0, 15), open_name(A, DAY + 1, 0, 5)]
    names.append(open_name(A, DAY, 12_500, 12_505))
    others = [open_name(B, DAY, B.start, 100_005), published_name(A, DAY)]
    assert open_files([*names, *others], A) == {
        ("event_date=2024-10-04", 0): [names[1], names[0]],
        ("event_date=2024-10-04", 12_500): [names[3]],
        ("event_date=2024-10-05", 0): [names[2]],
    }
