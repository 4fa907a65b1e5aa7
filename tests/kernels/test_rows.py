"""The loops in C, against torch's operators; and a machine without a compiler."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from multirank import without_c_loops

from shardemb import kernels

needs_compiler = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))


@pytest.fixture(params=["C", "torch"])
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "C":
        if kernels.why_not() is not None:
            pytest.skip(str(kernels.why_not()))
        yield "C"
    else:
        with without_c_loops():
            yield "torch"


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [0, 1, 7, 128])
def test_take_and_put(loops: str, threads: int, dim: int, dtype: torch.dtype) -> None:
    table = torch.randn(5001, dim).to(dtype)
    rows = torch.randint(5001, (9001,))
    assert kernels.take(table, rows).equal(table[rows])
    assert kernels.take(table, rows[:0]).shape == (0, dim)
    out = torch.empty(9001, dim, dtype=dtype)
    assert kernels.take(table, rows, out) is out
    assert kernels.take(table.t().contiguous().t(), rows).equal(table[rows])  # not contiguous
    once, values = torch.randperm(5001)[:4500], torch.randn(4500, dim).to(dtype)
    expected = table.index_copy(0, once, values)
    kernels.put(table, once, values)
    assert table.equal(expected)


@pytest.mark.parametrize("num_rows", [1, 7, 2048, 2049, 10**6, 2**40])
@pytest.mark.parametrize("n", [0, 1, 2, 5000])
def test_merge(loops: str, threads: int, num_rows: int, n: int) -> None:
    rows = torch.randint(num_rows, (n,))
    rows[: n // 3] = rows[:1]
    merged = kernels.merge(rows, num_rows)
    unique, inverse = rows.unique(return_inverse=True)
    assert merged.unique.equal(unique)
    assert merged.inverse.equal(inverse)
    for dtype in (torch.float32, torch.float64):
        values = torch.randn(n, 6, dtype=dtype)
        in_order = torch.zeros(len(unique), 6, dtype=dtype).index_add_(0, inverse, values)
        assert merged.sum(values).equal(in_order)
    for half in (torch.float16, torch.bfloat16):
        values = torch.randn(n, 6).to(half)
        in_order = torch.zeros(len(unique), 6).index_add_(0, inverse, values.float())
        assert merged.sum(values).equal(in_order.to(half))


@needs_compiler
def test_rows_out_of_range_are_refused() -> None:
    for bad in (-1, 7, 2**40):
        with pytest.raises(IndexError, match="expected 0 <= row < 7"):
            kernels.merge(torch.tensor([3, bad, 4]), 7)


def test_contiguous() -> None:
    wide = torch.ones(1, 128).expand(9001, 128)
    assert kernels.contiguous(wide).equal(wide)
    assert kernels.contiguous(wide).is_contiguous()
    assert kernels.contiguous(tensor := torch.randn(3, 2)) is tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "n"), [(1, 1, 1), (300, 70, 69), (7, 4100, 4100), (5, 3, 0)]
)
def test_count_better(
    loops: str, threads: int, rows: int, width: int, n: int, dtype: torch.dtype
) -> None:
    scores, out = (
        torch.randn(rows, width).mul(4).round().to(dtype),
        torch.ones(3, rows, dtype=torch.int64),
    )
    truth = scores[:, 0].clone()
    scores[0, -1], scores[-1, 0] = torch.nan, -torch.inf
    kernels.count_better(scores, truth, n, out)
    expected = [
        (mask[:, :n]).sum(1)
        for mask in (scores > truth[:, None], scores == truth[:, None], scores.isfinite())
    ]
    assert out.equal(torch.stack(expected) + 1)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("queries", "rows", "dim"),
    [(1, 1, 1), (300, 71, 7), (6, 4101, 128), (2, 3, 500), (0, 3, 4), (3, 0, 4), (3, 2, 0)],
)
def test_distances(
    loops: str, threads: int, p: int, dtype: torch.dtype, queries: int, rows: int, dim: int
) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(queries, dim, dtype=dtype), torch.randn(rows, dim, dtype=dtype)
    a[:rows] = b[:queries]  # some are not apart at all
    got = kernels.distances(a, b, p)
    difference = a.double().unsqueeze(1) - b.double()
    expected = (
        torch.linalg.vector_norm(difference, ord=p, dim=-1) if dim else torch.zeros(queries, rows)
    )
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(kernels.distances(a[None], b[None], p)[0], got)
    strange = (
        torch.tensor([[torch.nan], [torch.inf], [-torch.inf]], dtype=dtype)
        .expand(3, 9)
        .contiguous()
    )
    got = kernels.distances(strange, torch.zeros(2, 9, dtype=dtype), p)
    assert got[0].isnan().all()
    assert (got[1:] == torch.inf).all()


RULES = {
    "sgd": (),
    "adagrad": (6,),
    "rowwise_adagrad": (1,),
    "adam": (6, 6),
    "rowwise_adam": (6, 1),
}


@needs_compiler
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("constrained", [None, "unit_rows", "callable"])
def test_update(threads: int, rule: str, constrained: str | None) -> None:
    """In float64 by the formulas of the papers; touched rows and their state alone move."""
    rows = torch.randint(9001, (7001,))
    weight, grad = torch.randn(9001, 6), torch.randn(7001, 6)
    state = [torch.rand(9001, width) for width in RULES[rule]]
    w, (a, b) = weight.double(), [*(s.double() for s in state), None, None][:2]
    touched = torch.zeros(9001, 1, dtype=torch.bool).index_fill_(0, rows, True)
    g = torch.zeros(9001, 6, dtype=torch.float64).index_add_(0, rows, grad.double())
    square = g.square().mean(1, keepdim=True) if rule.startswith("rowwise") else g.square()
    new = w * (1 - 0.01)
    if rule == "sgd":
        new = new - 0.1 * g
    elif "adagrad" in rule:
        a = torch.where(touched, a + square, a)
        new = new - 0.1 * g / (a.sqrt() + 1e-3)
    else:
        a, b = (
            torch.where(touched, 0.9 * a + 0.1 * g, a),
            torch.where(touched, 0.8 * b + 0.2 * square, b),
        )
        new = new - 0.1 * a / (b.sqrt() + 1e-3)
    if constrained:
        new = torch.nn.functional.normalize(new)
    expected = torch.where(touched, new, w)

    def constrain(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.nn.functional.normalize(x)

    seen: list[int] = []
    merged = kernels.merge(rows, 9001)
    function = {None: None, "unit_rows": kernels.unit_rows, "callable": constrain}[constrained]
    options = {"eps": 1e-3, "betas": (0.9, 0.8), "decay": 0.01, "constrain": function}
    assert kernels.update(rule, weight, grad, merged, state, 0.1, **options)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)
    for got, right in zip(state, (a, b), strict=False):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    assert sum(seen) == (len(merged.unique) if constrained == "callable" else 0)
    assert not kernels.update(rule, weight.double(), grad, merged, state, 0.1)
    with without_c_loops():
        assert not kernels.update(rule, weight, grad, kernels.merge(rows, 9001), state, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("function", [kernels.unit_rows, torch.tanh])
def test_constrain(loops: str, threads: int, function, dtype: torch.dtype) -> None:
    table = torch.randn(5001, 7).to(dtype)
    table[:3] = torch.tensor([[0.0], [torch.nan], [torch.inf]])
    rows = torch.cat([torch.arange(3), torch.randperm(4998)[:4500] + 3])
    expected = table.index_copy(0, rows, function(table[rows]))
    kernels.constrain(table, rows, function)
    torch.testing.assert_close(table, expected, equal_nan=True)
    kernels.constrain(table, rows[:0], function)


def _why_not(folder: Path, **environment: str) -> tuple[str, str]:
    """Ask a fresh process, whose compiled loops go into a folder of its own."""
    code = (
        "from shardemb import kernels; import torch; print(kernels.why_not());"
        " kernels.take(torch.ones(3, 2), torch.tensor([1]))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip(), done.stderr


@needs_compiler
def test_compiled_once_and_done_without(tmp_path: Path) -> None:
    assert _why_not(tmp_path, SHARDEMB_NATIVE="0") == ("SHARDEMB_NATIVE is 0", "")
    said, _ = _why_not(tmp_path, CC="no-such-compiler")
    assert said.startswith("no C compiler")
    said, warned = _why_not(tmp_path, CC="false")
    assert "did not compile" in said
    assert "several times slower" in warned
    assert not list(tmp_path.rglob("*.so"))
    assert _why_not(tmp_path) == ("None", "")
    (library,) = tmp_path.rglob("*.so")
    made = library.stat().st_mtime_ns
    assert _why_not(tmp_path) == ("None", "")
    assert library.stat().st_mtime_ns == made


FORK = """
import os, torch
from shardemb import kernels
torch.set_num_threads(2)
table, rows = torch.randn(9001, 4), torch.arange(9001)
kernels.take(table, rows)
child = os.fork()
if child == 0:  # compared by numpy
    os._exit(0 if (kernels.take(table, rows).numpy() == table.numpy()).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@needs_compiler  # torch's own threads do not live on in the child
def test_forked_processes_have_threads_of_their_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)


def test_large_tensors_lie_in_large_pages() -> None:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists() or "[never]" in switch.read_text():
        pytest.skip("this Linux has no transparent huge pages")

    # of its own process: this one may have as much free memory in small pages
    script = """if True:
        from pathlib import Path
        import torch
        from shardemb import kernels

        def huge_kilobytes():
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])

        before = huge_kilobytes()
        tensor = kernels.empty((64 << 20,), torch.uint8).zero_()
        print(huge_kilobytes() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True
    )
    assert int(done.stdout) >= 48 << 10


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's, from 2.33 on")
def test_blocks_of_a_step_come_from_memory_that_is_kept() -> None:
    script = """if True:
        import ctypes, torch, shardemb
        shardemb.Embedding(1, shape=1)
        class Info(ctypes.Structure):  # mallinfo(3)
            names = "arena ordblks smblks hblks hblkhd a b c d e".split()
            _fields_ = [(name, ctypes.c_size_t) for name in names]
        told = ctypes.CDLL(None).mallinfo2
        told.restype = Info
        before = told().hblks
        block = torch.empty(24 << 20, dtype=torch.uint8)
        print(told().hblks - before)
    """
    plain = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=plain,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert int(done.stdout) == 0, (
        "mapped for itself, given back when it is freed, and its pages cleared again next time"
    )
