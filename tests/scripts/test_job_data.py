"""The text, its split and the order of the rows: pure functions, the same on any number of ranks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch

from scripts.job.data import (
    byte_frequency_bits,
    cut_rows,
    find_sources,
    read_corpus,
    row_starts,
    shares,
    split,
    standard_library,
    validation_starts,
)
from scripts.job.errors import JobError

from .jobs import write_text


@pytest.mark.parametrize("world", range(1, 6))
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world: int, accumulate: int):
    batch, n_bytes, context = 24, 5000, 32
    whole = row_starts(7, 3, range(batch), n_bytes, context)
    parts = [part for micro in shares(batch, world, accumulate) for part in micro]
    assert len(parts) == world * accumulate
    assert [start for part in parts for start in row_starts(7, 3, part, n_bytes, context)] == whole
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_too_many_ranks_for_the_batch():
    with pytest.raises(JobError, match=r"--batch 4 .* 3 ranks"):
        shares(4, 3, 2)


def test_rows_depend_on_seed_step_and_row_and_stay_inside():
    n_bytes, context = 100, 16
    starts = {(s, t): row_starts(s, t, range(50), n_bytes, context) for s in (1, 2) for t in range(3)}
    assert len({tuple(rows) for rows in starts.values()}) == 6
    seen = {start for rows in starts.values() for start in rows}
    assert min(seen) == 0
    assert max(seen) == n_bytes - context - 1  # the last row ends with the last byte
    assert row_starts(1, 2, [7], n_bytes, context) == starts[1, 2][7:8]


def test_the_order_of_the_rows_is_pinned():
    """Checkpoints of older runs count on it: a change of the hash would silently change the data of a resumed run."""
    assert row_starts(1, 0, range(3), 1 << 20, 128) == [357468, 1036422, 431965]


def test_cut_rows():
    text = torch.arange(20, dtype=torch.uint8)
    assert cut_rows(text, [0, 5], 3).tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]


def test_split_by_file_is_stable():
    names = [f"package/module_{i}.py" for i in range(1000)]
    train, val = split(names)
    assert sorted(train + val) == list(range(1000))
    assert 60 < len(val) < 140
    chosen = {names[i] for i in val}
    more = [*names[::-1], "new.py"]
    assert {more[i] for i in split(more)[1]} - {"new.py"} == chosen


def test_split_of_few_files():
    assert [len(side) for side in split(["a"])] == [1, 0]
    for names in (["a", "b"], ["a", "b", "c"]):
        train, val = split(names)
        assert train
        assert val


def test_corpus_of_a_folder(tmp_path: Path):
    folder = write_text(tmp_path / "text")
    corpus = read_corpus([str(folder)], 1 << 20, 16)
    assert not set(corpus.train_files) & set(corpus.val_files)
    assert len(corpus.train_files) + len(corpus.val_files) == 12
    expected = b"".join((folder / name).read_bytes() for name in sorted(corpus.train_files))
    assert corpus.train.numpy().tobytes() == expected


def test_limit_holds_and_text_changes_the_fingerprint(tmp_path: Path):
    folder = write_text(tmp_path / "text")
    small = read_corpus([str(folder)], 4000, 16)
    assert small.train.numel() + small.val.numel() <= 4000
    whole = read_corpus([str(folder)], 1 << 20, 16)
    assert whole.fingerprint == read_corpus([str(folder)], 1 << 20, 16).fingerprint != small.fingerprint


def test_sources_by_file_glob_and_url(tmp_path: Path):
    folder = write_text(tmp_path / "text", files=3)
    (folder / ".hidden").mkdir()
    (folder / ".hidden/secret.txt").write_text("x")
    (folder / "linked").symlink_to(folder / ".hidden")
    names = ["file_00.txt", "file_01.txt", "file_02.txt"]
    assert sorted(s.name for s in find_sources([str(folder)])) == names
    assert sorted(s.name for s in find_sources([f"{folder}/*_0[12].txt"])) == names[1:]
    assert [s.name for s in find_sources([f"file://{folder}/file_02.txt"])] == names[2:]
    with fsspec.open("memory://job-texts/one.txt", "wb") as file:
        file.write(b"abc" * 400)
    corpus = read_corpus(["memory://job-texts/one.txt"], 1 << 20, 16)
    assert (corpus.train.numel(), corpus.val.numel()) == (1080, 120)


@pytest.mark.parametrize(
    ("url", "words"),
    [("/nowhere/at/all", "matches no file"), ("/nowhere/*.txt", "matches no file"), ("what://x", "cannot be read")],
)
def test_no_text(url: str, words: str):
    with pytest.raises(JobError, match=words):
        read_corpus([url], 1000, 16)


def test_too_little_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(JobError, match="train text has 5 bytes"):
        read_corpus([str(tmp_path)], 1000, 16)


def test_the_standard_library_has_no_tests_and_no_installed_packages():
    names = [source.name for source in standard_library()]
    assert "json/decoder.py" in names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/")[:-1])]
    assert not [n for n in names if not n.endswith(".py")]


def test_validation_rows_cover_the_text_without_overlap():
    starts = validation_starts(1000, 10, 16)
    assert len(starts) == 10
    assert starts[0] == 0
    assert starts[-1] == 1000 - 17
    assert all(b - a >= 17 for a, b in itertools.pairwise(starts))
    assert len(validation_starts(40, 10, 16)) == 2


def test_byte_frequencies_by_hand():
    train, targets = b"aaab", b"abz"
    counts = Counter(train)
    probabilities = [(counts[byte] + 1) / (len(train) + 256) for byte in targets]
    expected = -sum(math.log2(p) for p in probabilities) / 3
    got = byte_frequency_bits(torch.tensor(list(train), dtype=torch.uint8), torch.tensor(list(targets)))
    assert got == pytest.approx(expected, rel=1e-12)
