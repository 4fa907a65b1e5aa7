from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardemb.vocabulary import Vocabulary


def test_ids_are_dense_shuffled_and_reproducible(tmp_path: Path) -> None:
    labels = [f"e{i:04d}" for i in range(1000)]
    vocabulary = Vocabulary.from_labels(labels + labels[::-1])
    assert len(vocabulary) == 1000
    assert vocabulary.labels == Vocabulary.from_labels(reversed(labels)).labels
    ids = vocabulary.ids(labels)
    assert ids.dtype == np.int64
    assert sorted(ids) == list(range(1000))
    assert [vocabulary.labels[i] for i in ids] == labels
    # the 100 first labels, as if they were the popular ones, spread over 4 shards
    assert np.bincount(ids[:100] // 250, minlength=4).max() < 40
    vocabulary.save(tmp_path / "v.parquet")
    assert Vocabulary.load(tmp_path / "v.parquet").labels == vocabulary.labels


def test_errors() -> None:
    with pytest.raises(ValueError, match="label 'b' stands twice"):
        Vocabulary(["a", "b", "b"])
    with pytest.raises(KeyError, match="nobody"):
        Vocabulary(["a"]).ids(["nobody"])


def test_files_that_are_no_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "entities.parquet"
    with pytest.raises(FileNotFoundError, match="entities"):
        Vocabulary.load(path)
    path.write_text("no Parquet")
    with pytest.raises(ValueError, match=r"entities\.parquet: got a file that is not Parquet"):
        Vocabulary.load(path)
    for columns, text in (
        ({"name": ["a"]}, r"got columns name \(string\), expected label \(string\)"),
        ({"label": [1]}, r"got columns label \(int64\), expected"),
        ({"label": ["a", None]}, "row 1: got no label"),
        ({"label": ["a", "b", "a"]}, "label 'a' stands twice"),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match=text) as caught:
            Vocabulary.load(path)
        assert str(path) in str(caught.value)
