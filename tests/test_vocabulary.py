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
    with pytest.raises(ValueError, match="label 'b' stands twice, as ids 1 and 2"):
        Vocabulary(["a", "b", "b"])
    with pytest.raises(KeyError, match="nobody"):
        Vocabulary(["a"]).ids(["nobody"])


def test_files_that_are_no_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "entities.parquet"
    with pytest.raises(FileNotFoundError, match=r"entities\.parquet"):
        Vocabulary.load(path)
    for wrong, text in (
        ({"name": ["a"]}, r": got columns \['name'\], expected 'label', each once"),
        ({"label": [0.5]}, ": got column 'label' of type double, expected strings"),
        ({"label": ["a", "b", None]}, ", row 2, column 'label': got a null, expected a label"),
        ({"label": ["a", "b", "c", "b"]}, ": label 'b' stands twice, as ids 1 and 3"),
    ):
        pq.write_table(pa.table(wrong), path)
        with pytest.raises(ValueError, match=f"{path}{text}"):
            Vocabulary.load(path)
    Vocabulary(["a", "b"]).save(path)
    for content in (b"", b"a\nb\n", path.read_bytes()[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: got a file that is not Parquet, or is damaged"):
            Vocabulary.load(path)


def test_any_text_comes_back(tmp_path: Path) -> None:
    labels = ["", " a ", "a\tb\n", "\ufeffa", "é", "\U0001f600"]
    Vocabulary(labels).save(tmp_path / "v.parquet")
    assert Vocabulary.load(tmp_path / "v.parquet").labels == labels
