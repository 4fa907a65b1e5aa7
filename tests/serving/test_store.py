import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import shardemb
from shardemb import Embedding, checkpoint
from shardemb.checkpoint import manifest, writer
from shardemb.checkpoint.manifest import CheckpointError
from shardemb.cli import main
from shardemb.kge import ModelConfig, TrainingConfig, Triples, train
from shardemb.kge.predict import best_tails
from shardemb.kge.sampling import SamplingConfig
from shardemb.serving import export
from shardemb.serving.export import export_table, import_table
from shardemb.vocabulary import Vocabulary

LABELS = [f"entity-{i}" for i in range(501)]


def _save(rank: int, world_size: int, folder: Path, kwargs: dict) -> torch.Tensor:
    writer.FILE_BYTES = 1500  # several files
    model = nn.Module()
    model.entity = Embedding(501, seed=1, name="entity", **kwargs)
    model.relation = Embedding(3, shape=4, seed=2, name="relation", sharding="replicated")
    if rank == 0:
        Vocabulary(LABELS).save(folder / "entities.arrow")
    fingerprints = {"entities": Vocabulary(LABELS).fingerprint}
    checkpoint.save(folder / "checkpoints", 7, model, state={"epoch": 2}, fingerprints=fingerprints)
    model.eval()
    with torch.no_grad():
        return model.entity(None)


KINDS = {
    "plain": {"shape": 6},
    "normalized": {"shape": 6, "normalizer": "normalize", "normalizer_kwargs": {"dim": -1}},
    "matrix": {"shape": (2, 3)},
    "complex": {"shape": 3, "dtype": torch.complex64},
    "half": {"shape": 8, "dtype": torch.float16, "kernel": "fused"},
    "bfloat16": {"shape": 5, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_lookup_gives_what_forward_gives(run_ranks, tmp_path: Path, kind: str, ranks: int) -> None:
    expected, *_ = run_ranks(_save, ranks, tmp_path, KINDS[kind])
    store = shardemb.open_store(tmp_path)
    assert (store.step, store.state) == (7, {"epoch": 2})
    assert len(store.manifest.files) > 3
    entity = store["entity"]
    assert (entity.max_id, entity.shape, entity.dtype) == (
        501,
        tuple(expected.shape[1:]),
        expected.dtype,
    )
    ids = torch.randint(501, (4, 5))
    assert torch.equal(store.lookup(ids), expected[ids])
    assert torch.equal(entity.lookup(["entity-500", "entity-0"]), expected[[500, 0]])
    assert torch.equal(entity.lookup("entity-17"), expected[17])
    assert torch.equal(entity.lookup(np.int64(3)), expected[3])
    assert entity.lookup([]).shape == (0, *expected.shape[1:])
    assert torch.equal(torch.cat([rows for _, rows in entity.chunks()]), expected)
    assert store["relation"].lookup(2).shape == (4,)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["normalized", "matrix", "complex"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_nearest_equals_a_plain_search(
    run_ranks, tmp_path: Path, kind: str, metric: str, ranks: int
) -> None:
    rows, *_ = run_ranks(_save, ranks, tmp_path, KINDS[kind])
    flat = (torch.view_as_real(rows) if rows.is_complex() else rows).reshape(501, -1).double()
    scores = {
        "dot": flat @ flat.T,
        "cosine": nn.functional.normalize(flat) @ nn.functional.normalize(flat).T,
        "l2": torch.cdist(flat, flat),
    }[metric][[5, 400]]
    store = shardemb.open_store(tmp_path)
    with_self = store.nearest([5, 400], k=501, metric=metric, exclude_query=False)
    expected = scores.sort(dim=1, descending=metric != "l2").values
    torch.testing.assert_close(with_self.scores.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.gather(1, with_self.ids), expected, atol=1e-5, rtol=1e-5)
    found = store.nearest(["entity-5", "entity-400"], k=4, metric=metric)
    assert not (found.ids == torch.tensor([[5], [400]])).any()
    assert found.labels is not None
    assert found.labels[0][0] == f"entity-{found.ids[0, 0]}"
    by_vector = store.nearest(rows[[5, 400]], k=4, metric=metric)
    torch.testing.assert_close(by_vector.scores, with_self.scores[:, :4])
    assert store.nearest(5, k=1000).ids.shape == (1, 500)


def test_what_cannot_be_looked_up(run_ranks, tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path, {"shape": 6})
    store = shardemb.open_store(tmp_path / "checkpoints")
    with pytest.raises(
        KeyError, match=r"table 'entity': got label 'nobody', expected one of the 501 labels"
    ):
        store.lookup("nobody")
    for bad in (501, -1):
        with pytest.raises(
            IndexError, match=f"table 'entity': got id {bad}, expected 0 <= id < 501"
        ):
            store.lookup([3, bad])
    with pytest.raises(TypeError, match="expected integers or labels"):
        store.lookup([1.5])
    with pytest.raises(
        KeyError, match=r"got table 'entities', expected one of \['entity', 'relation'\]"
    ):
        store["entities"]
    with pytest.raises(ValueError, match=r"expected \(q, \*\(6,\)\)"):
        store.nearest(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="expected 'cosine', 'dot' or 'l2'"):
        store.nearest(1, metric="l1")
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        shardemb.open_store(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a local path"):
        shardemb.open_store("s3://bucket/run")
    Vocabulary(LABELS[::-1]).save(tmp_path / "entities.arrow")
    with pytest.raises(CheckpointError, match="got other labels than the rows"):
        shardemb.open_store(tmp_path).lookup("entity-3")


def test_damage_is_found_at_the_latest_when_asked(run_ranks, tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path, {"shape": 6})
    path = next((tmp_path / "checkpoints" / "step-0000000007").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    shardemb.open_store(tmp_path)  # sizes alone
    with pytest.raises(CheckpointError, match="is damaged"):
        shardemb.open_store(tmp_path, verify="sha256")
    path.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=f"got {len(content) - 1} bytes, expected {len(content)}; it holds"
    ):
        shardemb.open_store(tmp_path)


def test_labels_are_those_of_the_entities_alone(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {"entity": Embedding(3, shape=2, name="entity"), "item": Embedding(5, shape=2, name="item")}
    )
    checkpoint.save(tmp_path, 1, model)
    Vocabulary(["a", "b", "c"]).save(tmp_path / "entities.arrow")
    store = shardemb.open_store(tmp_path)
    assert store["entity"].lookup("b").shape == (2,)
    assert store["item"].vocabulary is None
    with pytest.raises(KeyError, match="table 'item': got a label, but there is no vocabulary"):
        store["item"].lookup("b")
    Vocabulary(["a", "b"]).save(tmp_path / "entities.arrow")
    with pytest.raises(
        CheckpointError, match=r"entities\.arrow: got 2 labels for 3 rows of table 'entity'"
    ):
        shardemb.open_store(tmp_path)["entity"].lookup("b")


def halve(rows: torch.Tensor) -> torch.Tensor:
    return rows / 2


def test_a_normalizer_of_ones_own_must_be_given(tmp_path: Path) -> None:
    table = Embedding(5, shape=2, normalizer=halve, name="t")
    checkpoint.save(tmp_path, 1, table)
    with pytest.raises(
        CheckpointError, match="with the normalizer halve, a function of your own: give it"
    ):
        shardemb.open_store(tmp_path).lookup(0)
    with torch.no_grad():
        assert torch.equal(
            shardemb.open_store(tmp_path, normalizers={"": halve}).lookup([0, 1]),
            table(torch.tensor([0, 1])),
        )
        assert torch.equal(
            shardemb.open_store(tmp_path, normalizers={"": None}).lookup(0),
            table._embeddings.weight[0],
        )
    with pytest.raises(CheckpointError, match=r"normalizer for \['x'\], expected one of \[''\]"):
        shardemb.open_store(tmp_path, normalizers={"x": None})


def test_an_open_store_changes_no_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, Embedding(5, shape=2))
    store = shardemb.open_store(tmp_path)
    store.table._rows[0].zero_()
    assert shardemb.open_store(tmp_path, verify="sha256").lookup([0, 1]).abs().sum() > 0


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", ["normalized", "complex", "half"])
def test_exports_hold_what_lookup_gives(
    run_ranks, tmp_path: Path, monkeypatch, kind: str, ranks: int
) -> None:
    rows, *_ = run_ranks(_save, ranks, tmp_path, KINDS[kind])
    monkeypatch.setattr("shardemb.serving.store._CHUNK", 700)
    monkeypatch.setattr(export, "SHARD_BYTES", 3000)
    flat = (torch.view_as_real(rows) if rows.is_complex() else rows).reshape(501, -1).float()
    out = {
        name: export_table(tmp_path, tmp_path / f"x.{name}")
        for name in ("safetensors", "npy", "parquet", "vec")
    }
    export_table(tmp_path, tmp_path / "shards", "sharded")
    assert torch.equal(load_file(out["safetensors"])["weight"], rows)
    assert torch.equal(torch.from_numpy(np.load(out["npy"])), rows)
    table = pq.read_table(out["parquet"]).to_pydict()
    assert (table["id"], table["label"]) == (list(range(501)), LABELS)
    assert torch.equal(torch.tensor(table["vector"]), flat)
    lines = out["vec"].read_text().splitlines()
    assert lines[0] == f"501 {flat.shape[1]}"
    assert torch.equal(
        torch.tensor([[float(x) for x in line.split()[1:]] for line in lines[1:]]), flat
    )
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    assert len(set(index.values())) > 1
    parts = [load_file(tmp_path / "shards" / file)[name] for name, file in index.items()]
    assert torch.equal(torch.cat(parts), rows)
    with pytest.raises(FileExistsError, match=r"x\.npy exists"):
        export_table(tmp_path, tmp_path / "x.npy")
    with pytest.raises(ValueError, match="got format None"):
        export_table(tmp_path, tmp_path / "x.xyz")


def test_an_export_that_is_cut_short_leaves_nothing(run_ranks, tmp_path: Path, monkeypatch) -> None:
    run_ranks(_save, 1, tmp_path, {"shape": 6})
    monkeypatch.setattr("shardemb.serving.store._CHUNK", 700)
    before = sorted(tmp_path.rglob("*"))
    stored = shardemb.serving.store.StoredTable.stored

    def interrupted(self, ids):  # Ctrl-C in the second chunk
        if int(ids[0]) > 0:
            raise KeyboardInterrupt
        return stored(self, ids)

    monkeypatch.setattr("shardemb.serving.store.StoredTable.stored", interrupted)
    for name in ("x.npy", "x.safetensors", "x.parquet", "x.vec", "folder"):
        with pytest.raises(KeyboardInterrupt):
            export_table(tmp_path, tmp_path / name, "sharded" if name == "folder" else None)
    assert sorted(tmp_path.rglob("*")) == before


def test_labels_that_word2vec_cannot_hold(tmp_path: Path) -> None:
    import_table(torch.zeros(2, 3), tmp_path, labels=["a", "b c"])
    with pytest.raises(ValueError, match="got label 'b c', expected none with spaces"):
        export_table(tmp_path, tmp_path / "x.vec")
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet", ".vec"])
def test_what_was_exported_can_be_imported(run_ranks, tmp_path: Path, suffix: str) -> None:
    rows, *_ = run_ranks(_save, 2, tmp_path, {"shape": 6})
    file = export_table(tmp_path, tmp_path / f"x{suffix}")
    labels = None if suffix in (".parquet", ".vec") else LABELS
    import_table(file, tmp_path / "new", labels=labels)
    store = shardemb.open_store(tmp_path / "new", verify="sha256")
    assert torch.equal(store.lookup(torch.arange(501)), rows)
    assert torch.equal(store.lookup("entity-44"), rows[44])
    model = nn.Module()
    model.users = Embedding(501, shape=6)
    checkpoint.load(store.path, model, tables={"users": "entity"})
    assert torch.equal(model.users(None), rows)
    with pytest.raises(FileExistsError, match="has checkpoints"):
        import_table(file, tmp_path / "new")


def test_modules_of_torch_and_pykeen_can_be_imported(tmp_path: Path) -> None:
    layer = nn.Embedding(11, 3)
    assert (
        import_table(layer, tmp_path / "torch")
        == tmp_path / "torch" / "checkpoints" / "step-0000000000"
    )
    assert torch.equal(
        shardemb.open_store(tmp_path / "torch").lookup(torch.arange(11)), layer.weight
    )
    pykeen = pytest.importorskip("pykeen.nn")
    theirs = pykeen.Embedding(max_id=7, shape=(2, 2), initializer="xavier_uniform")
    import_table(theirs, tmp_path / "pykeen")
    assert shardemb.open_store(tmp_path / "pykeen").lookup(3).shape == (4,)
    both = nn.ModuleDict({"a": layer, "b": nn.Embedding(2, 2)})
    with pytest.raises(
        ValueError,
        match=(
            r"got a state dict with \['a.weight', 'b.weight'\], expected one table: give its key="
        ),
    ):
        import_table(both, tmp_path / "both")
    import_table(both, tmp_path / "b", key="b.weight")
    assert shardemb.open_store(tmp_path / "b").table.max_id == 2


MALFORMED = {
    "a pickle": ("x.pt", b"PK", r"a pickle, which can run code: load it yourself"),
    "objects": ("x.npy", b"\x93NUMPY\x01\x00", "got a file that is not numpy's, or holds objects"),
    "no Parquet": ("x.parquet", b"PAR", "not Parquet"),
    "no safetensors": ("x.safetensors", b"abc", "header"),
    "no header": ("x.vec", b"a 1 2\n", "line 1: got 'a 1 2', expected the number of rows"),
    "too few numbers": ("x.vec", b"2 2\na 1 2\nb 1\n", "line 3: got 1 numbers, expected 2"),
    "a word": ("x.vec", b"1 2\na 1 x\n", "line 2: got a value that is no number"),
    "cut off": ("x.vec", b"3 1\na 1\nb 2\n", "got 2 rows, expected 3, as the first line says"),
    "latin-1": ("x.vec", b"1 1\n\xe9 1\n", "line 2: got a byte that is not UTF-8"),
    "no rows": ("x.vec", b"0 0\n", "got 0 rows"),
    "another kind": ("x.csv", b"", "got a file of suffix '.csv', expected one of .npy"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_imports_are_named(tmp_path: Path, capfd, kind: str) -> None:
    name, content, text = MALFORMED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        import_table(tmp_path / name, tmp_path / "run")
    assert str(tmp_path / name) in str(caught.value)
    assert main(["checkpoint", "import", str(tmp_path / name), str(tmp_path / "run")]) == 1
    assert str(tmp_path / name) in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def _train(rank: int, world_size: int, output: Path, scorer: str, reciprocal: bool) -> dict:
    triples = [(f"e{i}", f"r{k}", f"e{(i + k + 1) % 83}") for i in range(83) for k in range(3)]
    columns = tuple(list(column) for column in zip(*triples, strict=True))
    data = Triples.from_columns("ring", columns, ([], [], []), ([], [], []))
    config = TrainingConfig(epochs=40, seed=1, validate_every=0)
    sampling = SamplingConfig(batch_size=60, chunk_size=20, num_negatives=30)
    settings = ModelConfig(scorer=scorer, reciprocal=reciprocal, dim=16, init_std=0.1, n3=0.01)
    model, _ = train(
        data, settings, sampling=sampling, training=config, output=output, progress=False
    )
    heads, relations = data.entities.ids(["e3", "e80"]), data.relations.ids(["r0", "r2"])
    with torch.no_grad():
        queries = [
            model.queries(side, torch.from_numpy(heads), torch.from_numpy(relations))
            for side in ("tail", "head")
        ]
        scores, inverse = (model.scorer.score_all(query, model.entity(None)) for query in queries)
    return {"scores": scores, "inverse": inverse}


@pytest.mark.parametrize(("scorer", "reciprocal"), [("rotate", False), ("complex", False)])
def test_best_tails_and_heads(run_ranks, tmp_path: Path, scorer: str, reciprocal: bool) -> None:
    expected, *_ = run_ranks(_train, 1, tmp_path, scorer, reciprocal)
    for inverse, name in ((False, "scores"), (True, "inverse")):
        found = best_tails(
            shardemb.open_store(tmp_path), ["e3", "e80"], ["r0", "r2"], 5, inverse=inverse
        )
        best = expected[name].topk(5)
        torch.testing.assert_close(found.scores, best.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.ids, best.indices)


def test_best_tails_and_the_command_line(run_ranks, tmp_path: Path, capfd) -> None:
    expected, *_ = run_ranks(_train, 2, tmp_path, "complex", True)
    store = shardemb.open_store(tmp_path)
    for inverse, name in ((False, "scores"), (True, "inverse")):
        found = best_tails(store, ["e3", "e80"], ["r0", "r2"], 5, inverse=inverse)
        best = expected[name].topk(5)
        torch.testing.assert_close(found.scores, best.values)
        assert torch.equal(found.ids, best.indices)
    run = str(tmp_path)
    assert main(["query", run, "e3", "r0", "-k", "3"]) == 0
    assert capfd.readouterr().out.splitlines()[0].endswith("  e4")
    assert main(["query", run, "e3", "r0", "--inverse", "-k", "1"]) == 0
    assert capfd.readouterr().out.endswith("  e2\n")
    assert main(["query", run, "e3", "--metric", "l2", "-k", "2"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 2
    assert main(["query", run, "nobody"]) == 1
    assert "error: " in (err := capfd.readouterr().err)
    assert "got label 'nobody', expected one of the 83 labels" in err
    assert main(["checkpoint", "ls", run]) == 0
    out = capfd.readouterr().out
    assert "  entity: 83 x 16  float32" in out
    assert "2 rank(s)" in out
    assert main(["checkpoint", "verify", run]) == 0
    assert capfd.readouterr().out.count("undamaged") == 2
    assert main(["checkpoint", "export", run, str(tmp_path / "x.npy"), "--table", "relation"]) == 0
    assert np.load(tmp_path / "x.npy").shape == (6, 16)
    newest = Path(checkpoint.checkpoints(tmp_path / "checkpoints")[-1])
    file = next(newest.glob("rank-00001*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["checkpoint", "verify", run]) == 1
    assert f"{file}: got" in capfd.readouterr().err
    assert main(["checkpoint", "verify", str(newest)]) == 1
    assert main(["checkpoint", "ls", str(tmp_path / "none")]) == 1


def test_reading_needs_no_process_group_and_no_training_code(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, Embedding(5, shape=2))
    code = (
        f"import sys, shardemb; shardemb.open_store({str(tmp_path)!r}).lookup(1);"
        " print(sorted(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "'shardemb.embedding'" not in out
    assert "fbgemm" not in out
    assert manifest.MANIFEST == "manifest.json"


def test_a_store_is_pickled_and_copied_by_its_path(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"t": shardemb.Embedding(10_000, shape=8, seed=0, name="t")})
    shardemb.checkpoint.save(tmp_path / "checkpoints", 1, model, state={"seen": {3: (1, 2)}})
    store = shardemb.open_store(tmp_path)
    assert store.state == {"seen": {3: (1, 2)}}
    text = pickle.dumps(store)
    assert len(text) < 1000
    for other in (pickle.loads(text), copy.deepcopy(store), copy.copy(store)):
        assert torch.equal(other.lookup([1, 7]), store.lookup([1, 7]))
        assert torch.equal(other.lookup([1], raw=True), store.lookup([1], raw=True))
        assert other.state == store.state
    table = pickle.loads(pickle.dumps(store["t"]))
    assert torch.equal(table.lookup([3]), store.lookup([3]))
    assert table.name == "t"
