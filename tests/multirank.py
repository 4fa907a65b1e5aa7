"""Random training jobs, run on 1 to 4 ranks and in one process by an oracle of plain torch.

This module must not import pykeen: ranks import it too. The oracle gets PyKEEN's class from its
caller.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from hypothesis import strategies as st

import shardemb
from shardemb import Coordinator, Embedding, Fused, FusedOptimizer, Sharding
from shardemb.kernels import rows as native
from shardemb.sharding.fused_table import FusedTable
from shardemb.sharding.table import ParameterTable, Table

OURS = ("SparseSGD", "SparseAdagrad", "RowWiseAdagrad", "LazyAdam", "RowWiseAdam")
#: gradient, optimizer, its arguments
KERNELS = [
    ("dense", "SGD", {"lr": 0.02}),
    ("dense", "SGD", {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}),
    ("dense", "Adagrad", {"lr": 0.3}),
    ("dense", "Adam", {"lr": 0.1}),
    ("sparse", "SGD", {"lr": 0.02}),
    ("sparse", "Adagrad", {"lr": 0.3}),
    ("sparse", "SparseAdam", {"lr": 0.1}),
    *(
        ("sparse", name, {"lr": 0.02 if "SGD" in name else 0.2, "weight_decay": w})
        for name in OURS
        for w in (0.0, 0.1)
    ),
    ("fused", "sgd", {"lr": 0.02}),
    ("fused", "adagrad", {"lr": 0.3}),
    ("fused", "rowwise_adagrad", {"lr": 0.3}),
]


def third(x: torch.Tensor) -> torch.Tensor:
    """A constrainer that is not idempotent, so all rows get it after each step."""
    return x / 3


CONSTRAINERS = [
    (None, None),
    ("normalize", None),
    ("normalize", {"dim": -1}),
    ("clamp_norm", {"maxnorm": 0.7, "dim": -1}),
    (third, None),
]
NORMALIZERS = [(None, None), ("normalize", {"dim": -1}), (torch.tanh, None)]


@st.composite
def jobs(draw: Callable[..., Any]) -> dict[str, Any]:
    """A table, an optimizer, and what each rank looks up in each step."""
    world_size = draw(st.integers(1, 4))
    gradient, optimizer, options = draw(st.sampled_from(KERNELS))
    rows = draw(st.sampled_from([1, 2, 3, 5, 7, 23, 101]))
    lookups = 1 if gradient == "fused" else draw(st.integers(1, 3))
    size = st.one_of(st.just(0), st.integers(1, 9))
    step = st.lists(
        st.lists(size, min_size=world_size, max_size=world_size), min_size=lookups, max_size=lookups
    )
    dtype = draw(
        st.sampled_from([torch.float32] + [torch.float64, torch.complex128] * (gradient != "fused"))
    )
    placement = (
        draw(st.sampled_from(["row_wise", "row_wise", "replicated"]))
        if gradient != "fused"
        else "row_wise"
    )
    shape = draw(st.sampled_from([1, 6, 7, (3, 2), 128]))
    # a norm in forward multiplies what float32 rounds, where a constrainer makes rows small; of one
    # number it has no gradient
    normalizer = draw(
        st.sampled_from(
            [
                n
                for n in NORMALIZERS
                if n[0] != "normalize" or (dtype != torch.float32 and shape != 1)
            ]
        )
    )
    regularizer = (
        draw(st.sampled_from([None, None, "norm_limit"])) if normalizer[0] != "normalize" else None
    )
    return {
        "world_size": world_size,
        "gradient": gradient,
        "optimizer": optimizer,
        "options": options,
        "rows": rows,
        "shape": shape,
        "dtype": dtype,
        "constrainer": draw(st.sampled_from(CONSTRAINERS)),
        "normalizer": normalizer,
        "regularizer": regularizer,
        "unique": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "placement": placement,
        # a replicated table's gradients are the coordinator's to reduce
        "coordinated": placement == "replicated" or draw(st.booleans()),
        "zeros": draw(st.booleans()),
        "deduplicate": draw(st.booleans()),
        "c_loops": draw(st.sampled_from([True, True, False])),
        "clip": draw(st.sampled_from([None, None, 0.5])) if gradient != "fused" else None,
        "steps": draw(st.lists(step, min_size=1, max_size=4)),
        "seed": draw(st.integers(0, 2**31)),
    }


def common(job: dict[str, Any]) -> dict[str, Any]:
    """What PyKEEN's table takes as well as ours."""
    (constrainer, constrainer_kwargs), (normalizer, normalizer_kwargs) = (
        job["constrainer"],
        job["normalizer"],
    )
    return {
        "max_id": job["rows"],
        "shape": job["shape"],
        "dtype": job["dtype"],
        "initializer": "normal",
        "constrainer": constrainer,
        "constrainer_kwargs": constrainer_kwargs,
        "normalizer": normalizer,
        "normalizer_kwargs": normalizer_kwargs,
        "regularizer": job["regularizer"],
        # no limit that a constrainer reaches: the gradient jumps there
        "regularizer_kwargs": {"max_norm": 0.37} if job["regularizer"] else None,
        "unique": job["unique"],
    }


def ids_of(job: dict[str, Any], step: int, lookup: int, ranks: list[int]) -> torch.Tensor:
    """Ids with duplicates, within and between ranks; different numbers a rank, also none."""
    sizes = job["steps"][step][lookup]
    generator = torch.Generator().manual_seed(job["seed"] + 10 * step + lookup)
    ids = torch.randint(job["rows"], (sum(sizes),), generator=generator)
    ids[: len(ids) // 3] = ids[:1]
    parts = ids.split(sizes)
    return torch.cat([parts[rank] for rank in ranks])


def loss_of(table: Any, ids: list[torch.Tensor], zeros: bool) -> torch.Tensor:
    """A sum over ids, so that the parts of several ranks add up.

    ``zeros`` gives every third row a gradient that is 0.
    """
    total = torch.zeros((), dtype=torch.float64)
    for part in ids:
        out = table(part).flatten(1)
        factors = torch.sin(torch.arange(out.shape[1]) + part[:, None] * 0.1 + 1)
        if zeros:
            factors = factors * (part % 3 > 0)[:, None]
        total = total + (out * factors).abs().square().sum()
    if table.regularizer is not None:
        total = total + table.regularizer.pop_regularization_term().sum()
    return total


def make_table(job: dict[str, Any]) -> Embedding:
    kernel = job["gradient"]
    if kernel == "fused":
        kernel = Fused(FusedOptimizer(job["optimizer"], **job["options"]))
    table = Embedding(
        **common(job),
        kernel=kernel,
        sharding=Sharding(
            placement=job["placement"],
            gradient_reduction=job["reduction"],
            deduplicate=job["deduplicate"],
        ),
        seed=job["seed"],
        name="table",
    )
    table.reset_parameters()
    return table


def train(
    rank: int, world_size: int, job: dict[str, Any], plant: str | None = None
) -> torch.Tensor:
    """Train ours on this rank; ``world_size`` 1 takes the ids of all ranks.

    Returns all stored rows.
    """
    with (
        planted(plant) if plant is not None else nullcontext(),
        nullcontext() if job["c_loops"] else without_c_loops(),
    ):
        return _train(rank, world_size, job)


def _train(rank: int, world_size: int, job: dict[str, Any]) -> torch.Tensor:
    ranks = [rank] if world_size > 1 else list(range(job["world_size"]))
    table = make_table(job)
    optimizers = []
    if job["gradient"] != "fused":
        module = shardemb.optim if job["optimizer"] in OURS else torch.optim
        optimizers = [getattr(module, job["optimizer"])(table.parameters(), **job["options"])]
    coordinator = None
    if job["coordinated"]:
        coordinator = Coordinator(table, optimizers, max_grad_norm=job["clip"])
    for step in range(len(job["steps"])):
        ids = [ids_of(job, step, lookup, ranks) for lookup in range(len(job["steps"][step]))]
        scale = world_size if job["reduction"] == "mean" else 1
        (loss_of(table, ids, job["zeros"]) * scale).backward()
        if coordinator is not None:
            coordinator.step()
            continue
        if job["clip"] is not None:
            shardemb.clip_grad_norm_(table, job["clip"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        table.post_parameter_update()
    return table.full_state_dict("torch")["weight"].clone()


def oracle(job: dict[str, Any], pykeen_embedding: Any) -> torch.Tensor:
    """The same in one process.

    PyKEEN's table, dense gradients, a formula for each rule, a constrainer on all rows.
    """
    table = pykeen_embedding(**common(job))
    weight = table._embeddings.weight
    weight.data.copy_(make_table({**job, "gradient": "dense"}).full_state_dict("torch")["weight"])
    dense = None
    if job["gradient"] == "dense":
        dense = getattr(torch.optim, job["optimizer"])([weight], **job["options"])
    state: dict[str, torch.Tensor] = {}
    for step in range(len(job["steps"])):
        ids = [
            ids_of(job, step, n, list(range(job["world_size"])))
            for n in range(len(job["steps"][step]))
        ]
        weight.grad = None
        loss_of(table, ids, job["zeros"]).backward()
        if job["clip"] is not None:
            torch.nn.utils.clip_grad_norm_([weight], job["clip"])
        if dense is not None:
            dense.step()
        else:
            touched = torch.zeros(len(weight), 1, dtype=torch.bool)
            touched[torch.cat(ids)] = True
            with torch.no_grad():
                rule(
                    job["optimizer"].lower(),
                    job["options"],
                    weight,
                    weight.grad,
                    touched,
                    state,
                    step + 1,
                )
        table.post_parameter_update()
    return weight.detach()


def rule(
    name: str,
    options: dict[str, float],
    w: torch.Tensor,
    g: torch.Tensor,
    touched: torch.Tensor,
    state: dict,
    step: int,
) -> None:
    """Update touched rows by the textbook."""
    lr, decay = options["lr"], options.get("weight_decay", 0.0)
    new = w * (1 - lr * decay)
    if name in ("sgd", "sparsesgd"):
        new = new - lr * g
    elif "adagrad" in name:
        square = g.square().mean(1, keepdim=True) if "rowwise" in name else g.square()
        state["sum"] = state.get("sum", 0) + square
        new = new - lr * g / (state["sum"].sqrt() + 1e-10)
    else:  # Adam whose moments stand still where no gradient comes
        square = g.square().mean(1, keepdim=True) if "rowwise" in name else g.square()
        m, v = state.get("m", torch.zeros_like(g)), state.get("v", torch.zeros_like(square))
        state["m"] = torch.where(touched, 0.9 * m + 0.1 * g, m)
        state["v"] = torch.where(touched, 0.999 * v + 0.001 * square, v)
        rate = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        new = new - rate * state["m"] / (state["v"].sqrt() + 1e-8)
    w.copy_(torch.where(touched, new, w))


@contextmanager
def without_c_loops() -> Iterator[None]:
    """Do as on a machine without a C compiler."""
    found = native._library
    native._library = lambda: "not in this test"
    try:
        yield
    finally:
        native._library = found


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """Break our tables in one of the ways that the comparison is there to find."""
    lookups = {cls: cls.lookup for cls in (ParameterTable, FusedTable)}
    constrain = Table.constrain_

    def off_by_one(self: Table, rows: torch.Tensor) -> torch.Tensor:
        return lookups[type(self)](self, (rows + 1) % max(1, self.plan.num_local))

    def dropped_duplicate(self: Table, rows: torch.Tensor) -> torch.Tensor:
        out = lookups[type(self)](self, rows)
        if out.requires_grad:
            first = torch.tensor(
                [row not in rows[:i].tolist() for i, row in enumerate(rows.tolist())],
                dtype=torch.bool,
            )
            out.register_hook(lambda grad: grad * first[:, None])
        return out

    def wrong_rows(self: Table, function: Callable[..., Any], changed_only: bool) -> int:
        weight = self.weight.detach()
        if not len(weight):
            return 0
        first = weight[:1].clone()
        done = constrain(self, function, changed_only)
        weight[:1] = first  # as if a range began one row late
        return done

    try:
        if bug == "constrainer on wrong rows":
            Table.constrain_ = wrong_rows
        else:
            for cls in lookups:
                cls.lookup = {"off by one": off_by_one, "dropped duplicate": dropped_duplicate}[bug]
        yield
    finally:
        Table.constrain_ = constrain
        for cls, lookup in lookups.items():
            cls.lookup = lookup


BUGS = ("off by one", "dropped duplicate", "constrainer on wrong rows")


def exact(job: dict[str, Any]) -> bool:
    """Whether ranks give the bits that one process gives.

    Sums in the same order, and no function in between whose last bit depends on how many numbers
    are computed together (tanh, a norm, the modulus of a complex number).
    """
    plain = (
        job["placement"] == "row_wise"
        and job["normalizer"][0] is None
        and job["regularizer"] is None
        and not job["unique"]
        and job["clip"] is None
        and not (job["deduplicate"] and job["world_size"] > 1)
    )
    return (
        plain
        and "sgd" in job["optimizer"].lower()
        and job["reduction"] == "sum"
        and not job["dtype"].is_complex
    )


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of the table."""
    return (
        ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
        if expected.numel()
        else 0.0
    )
