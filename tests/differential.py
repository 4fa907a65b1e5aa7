"""Random configurations of the interface, run on PyKEEN's table and on ours.

What happens is compared, step by step.

Not drawn, because ours differs on purpose: a constrainer that is no function of single rows
(clamp_norm without dim; any along the last dimension of shape ()), which is refused; regularizer=3,
which PyKEEN takes until forward; complex_normalize on no rows; ids for a table of no rows or
columns, which are out of range here and cannot be reshaped there; init_phases in half precision,
which torch cannot view as complex there; and init_quaternions in other dtypes, which PyKEEN turns
into float32.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)


def halve(x: torch.Tensor) -> torch.Tensor:
    """A constrainer that is not idempotent."""
    return x / 2


def ramp_(x: torch.Tensor) -> torch.Tensor:
    """An initializer in place, as the documented callables are."""
    with torch.no_grad():
        return x.copy_(
            torch.linspace(-1, 1, max(1, x[0].numel() if len(x) else 1))[: x[:1].numel()]
            .view(x[:1].shape)
            .expand(x.shape)
        )


class Rows:
    """A pretrained initializer, as PyKEEN's: it has a tensor of real numbers."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        pairs = (2,) if dtype is not None and dtype.is_complex else ()
        self.tensor = torch.linspace(-2, 2, torch.Size((*shape, *pairs)).numel()).view(
            *shape, *pairs
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape != self.tensor.shape:
            raise ValueError(f"expected {self.tensor.shape}, got {x.shape}")
        return self.tensor.to(x)


def as_tuple(shape: Any) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def named(name: Any, **kwargs: st.SearchStrategy) -> st.SearchStrategy[tuple[Any, dict | None]]:
    """A function and some of its keyword arguments; none at all stands for None."""
    chosen = st.fixed_dictionaries({}, optional=kwargs) if kwargs else st.none()
    return st.tuples(name if isinstance(name, st.SearchStrategy) else st.just(name), chosen)


P = st.sampled_from([1, 2, 3.0])
WEIGHT = st.sampled_from([0.1, 2.0])
NONE = st.just((None, None))
#: these give the same rows in both
FIXED_INITIALIZERS = ("ones", "zeros", "constant", "eye", "dirac", ramp_)


def initializers(shape: tuple[int, ...], dtype: torch.dtype | None) -> st.SearchStrategy:
    """Those that can fill rows of a shape."""
    is_complex = dtype is not None and dtype.is_complex
    stored = (*shape, 2) if is_complex else shape
    found = [
        NONE,
        named(
            st.sampled_from(
                [
                    "xavier_uniform",
                    "XavierNormal",
                    "xavieruniformnorm",
                    "xavier normal norm",
                    "normal_norm",
                ]
            )
        ),
        named(
            st.sampled_from(
                [
                    "uniform_norm",
                    "ones",
                    "zeros",
                    "UNIFORM",
                    "normal_",
                    "kaiming-normal",
                    "orthogonal",
                ]
            )
        ),
        named("uniform", a=st.just(-1.0), b=st.just(2.0)),
        named("normal", mean=st.just(1.0), std=st.just(0.5)),
        named("trunc_normal", std=st.just(0.5)),
        named("kaiming_uniform", mode=st.sampled_from(["fan_in", "fan_out"])),
        named(st.sampled_from([ramp_, torch.nn.init.xavier_uniform_])),
        named(F.normalize, p=P),
        st.just(("constant", {"val": 0.5})),
    ]
    if len(stored) == 1:
        found += [named("eye"), st.just(("sparse", {"sparsity": 0.3}))]
    if len(stored) > 1:
        found += [named("dirac")]
    if stored[-1] % 2 == 0 and dtype not in HALF:
        found += [named("init_phases")]
    if stored[-1] == 4 and dtype in (None, torch.float32):
        found += [named("init_quaternions")]
    return st.one_of(found)


def constrainers(shape: tuple[int, ...], is_complex: bool) -> st.SearchStrategy:
    found = [
        NONE,
        named("normalize", p=P, dim=st.sampled_from([-1, 1])),
        st.just(("clamp_norm", {"maxnorm": 0.5, "dim": -1})),
        st.just(("clamp_norm", {"maxnorm": 1.5, "dim": -1, "p": 1})),
        named(halve),
    ]
    if is_complex or shape[-1] % 2 == 0:
        found += [named("complex_normalize")]
    if not is_complex:
        found += [
            st.just(("clamp", {"min": -0.4, "max": 0.7})),
            st.just(("clamp", {"max": 0.2})),
            named(F.relu),
        ]
    return st.one_of(found)


def normalizers(is_complex: bool) -> st.SearchStrategy:
    found = [
        NONE,
        named("normalize", p=P, dim=st.sampled_from([-1, -1, 1])),
        named(st.sampled_from([halve, torch.tanh])),
    ]
    return st.one_of(found if is_complex else [*found, named("softmax", dim=st.just(-1))])


REGULARIZERS = st.one_of(
    NONE,
    NONE,
    named("lp", weight=WEIGHT, p=P, dim=st.sampled_from([-1, None]), normalize=st.booleans()),
    named(st.sampled_from(["LpRegularizer", "no"])),
    named("power_sum", weight=WEIGHT, p=P, normalize=st.booleans(), apply_only_once=st.booleans()),
    named("norm_limit", weight=WEIGHT, p=P, max_norm=st.just(0.5), power_norm=st.booleans()),
)
OPTIMIZERS = st.sampled_from(
    [
        ("SGD", {"lr": 0.5}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        ("Adagrad", {"lr": 0.3}),
        ("Adam", {"lr": 0.1}),
        ("AdamW", {"lr": 0.1}),
    ]
)
SIZES = st.sampled_from(
    [{"max_id": n} for n in (1, 2, 5, 11, 13)]
    + [{"num_embeddings": 7}, {"max_id": 7, "num_embeddings": 7}]
)
SHAPES = st.sampled_from(
    [{"shape": s} for s in (1, 6, 7, (3, 2), [4], (2, 2, 2), (3, 4))] + [{"embedding_dim": 5}]
)
DTYPES = st.sampled_from(
    [None] * 6 + [torch.float64] * 4 + [torch.complex64] * 3 + [torch.complex128, *HALF]
)
#: what is no table, or hardly one; put into every fifth configuration
FAULTS = st.sampled_from(
    [
        {"max_id": 0, "constrainer": None},
        {"max_id": 7, "num_embeddings": 8},
        {"max_id": None, "num_embeddings": None},
        {"shape": (), "embedding_dim": None, "constrainer": None},
        {"shape": 0, "embedding_dim": None},
        {"shape": None, "embedding_dim": None},
        {"shape": 3, "embedding_dim": 3},
        {"shape": 2.0, "embedding_dim": None},
        {"shape": "ab", "embedding_dim": None},
        {"dtype": torch.int64},
        {"max_id": -1},
        {"shape": -2, "embedding_dim": None},
        {"initializer": "eye", "initializer_kwargs": None},
        {"initializer": "dirac", "initializer_kwargs": None},
        {"initializer": "sparse", "initializer_kwargs": None},
        {"constrainer": "clamp", "constrainer_kwargs": {"min": -0.1}},
        {"constrainer": "clamp_norm", "constrainer_kwargs": None},
        {"constrainer": "complex_normalize", "constrainer_kwargs": None},
        {"normalizer": "softmax", "normalizer_kwargs": None},
        {"normalizer": "normalize", "normalizer_kwargs": {"dim": 0}},
        {"regularizer": "orthogonality", "regularizer_kwargs": {"epsilon": 0.1}},
        {"dropout": 1.5},
        {"regularizer": "lp", "regularizer_kwargs": {"nope": 1}},
        {"nope": 1},
        *({key: "nope"} for key in ("initializer", "constrainer", "normalizer", "regularizer")),
        *({key: 3} for key in ("initializer", "constrainer", "normalizer")),
    ]
)
IDS = st.one_of(
    st.none(),
    *(
        st.tuples(st.just(size), st.sampled_from(["int64", "int32"]))
        for size in ((), (0,), (5,), (4, 3), (2, 1, 2), (1, 1))
    ),
)
BAD_IDS = st.sampled_from(["high", "negative", "float", "list", "bool"])


@st.composite
def configurations(draw: Callable[..., Any]) -> dict[str, Any]:
    """Everything of PyKEEN's interface, and n steps with it."""
    kwargs: dict[str, Any] = {**draw(SIZES), **draw(SHAPES)}
    shape, dtype = as_tuple(kwargs.get("shape", 5)), draw(DTYPES)
    is_complex = dtype is not None and dtype.is_complex
    for key, strategy in (
        ("initializer", initializers(shape, dtype)),
        ("constrainer", constrainers(shape, is_complex)),
        ("normalizer", normalizers(is_complex)),
        ("regularizer", REGULARIZERS),
    ):
        value, options = draw(strategy)
        if value is not None or draw(st.booleans()):
            kwargs[key] = value
            if options or draw(st.booleans()):
                kwargs[f"{key}_kwargs"] = options
    if dtype is not None:
        kwargs["dtype"] = dtype
    for key, values in (
        ("dropout", [None, None, 0, 0.5]),
        ("unique", [None, None, True, False]),
        ("trainable", [True] * 7 + [False]),
    ):
        value = draw(st.sampled_from(values))
        if value is not None:
            kwargs[key] = value
    pretrained = draw(st.integers(0, 9)) == 0
    if pretrained:
        kwargs["initializer"] = Rows(
            (kwargs.get("max_id", 7), *as_tuple(kwargs.get("shape", 5))), kwargs.get("dtype")
        )
        kwargs.pop("initializer_kwargs", None)
    if draw(st.integers(0, 4)) == 0:
        kwargs |= draw(FAULTS)
        if kwargs.get("constrainer") is None:
            kwargs.pop("constrainer_kwargs", None)
    quaternions = (
        kwargs.get("initializer") == "init_quaternions"
    )  # PyKEEN makes them in the default dtype
    return {
        "kwargs": kwargs,
        "steps": draw(st.lists(IDS, min_size=1, max_size=4)),
        "bad": (
            draw(st.one_of(st.none(), st.none(), st.none(), BAD_IDS))
            if 0 not in kwargs.values()
            else None
        ),
        "optimizer": draw(OPTIMIZERS),
        "training": draw(st.sampled_from([True, True, True, False])),
        "pop": draw(st.sampled_from([True, True, False])),
        "default_dtype": (
            torch.float32
            if quaternions
            else draw(st.sampled_from([torch.float32] * 3 + [torch.float64]))
        ),
        "seed": draw(st.integers(0, 2**31)),
    }


def make_ids(spec: Any, max_id: int, seed: int) -> torch.Tensor | None:
    if spec is None:
        return None
    size, dtype = spec
    if max_id == 0:
        size = (0,)
    ids = torch.randint(
        max(1, max_id),
        size,
        generator=torch.Generator().manual_seed(seed),
        dtype=getattr(torch, dtype),
    )
    # as PyKEEN's loops have them: a column of something larger
    return torch.stack([ids, ids + 1], dim=-1)[..., 0]


def make_bad_ids(kind: str, max_id: int) -> Any:
    return {
        "high": torch.tensor([0, max_id]),
        "negative": torch.tensor([[-1]]),
        "float": torch.tensor([0.0]),
        "list": [0],
        "bool": torch.tensor([True]),
    }[kind]


class StoppedError(Exception):
    """A stage raised; what follows cannot be compared."""


class Record:
    """What a run did: stage by stage its results, warnings and error."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, Any, list[type], type | None]] = []

    def stage(self, name: str, function: Callable[[], Any]) -> Any:
        value, error = None, None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = function()
            except Exception as raised:
                error = raised
        kept = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), value)
        # torch tells its own deprecations once a process
        categories = sorted({w.category for w in caught if "torch" not in str(w.message)}, key=str)
        self.stages.append((name, kept, categories, type(error) if error else None))
        if error is not None:
            raise StoppedError from error
        return value


def run(cls: Callable[..., Any], config: dict[str, Any]) -> Record:
    """Make a table and train it as PyKEEN's models and loops do."""
    record = Record()
    before = torch.get_default_dtype()
    torch.set_default_dtype(config["default_dtype"])
    try:
        _run(cls, config, record)
    except StoppedError:
        pass
    finally:
        torch.set_default_dtype(before)
    return record


def probed(cls: Callable[..., Any], config: dict[str, Any]) -> type | None:
    """The error that a constrainer meets on fresh rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cls(**config["kwargs"]).post_parameter_update()
        except Exception as error:
            return type(error)
    return None


def _run(cls: Callable[..., Any], config: dict[str, Any], record: Record) -> None:
    kwargs, seed = config["kwargs"], config["seed"]
    kept: list[Any] = []

    def construct() -> Any:
        kept.append(cls(**kwargs))
        m = kept[0]
        return (
            m.max_id,
            m.shape,
            m.unique,
            m.device,
            m.is_complex,
            [(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()],
        )

    def reset() -> Any:
        module.reset_parameters()
        weight = module._embeddings.weight.detach()
        fixed = kwargs.get("initializer") in FIXED_INITIALIZERS or isinstance(
            kwargs.get("initializer"), Rows
        )
        return weight if fixed else (weight.shape, weight.dtype)

    record.stage("construct", construct)
    module = kept[0]
    record.stage("reset", reset)
    weight = module._embeddings.weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(
        weight.dtype
    )
    module.train(config["training"])
    record.stage(
        "state",
        lambda: sorted((key, tuple(v.shape), v.dtype) for key, v in module.state_dict().items()),
    )
    name, options = config["optimizer"]
    optimizer = getattr(torch.optim, name)(list(module.parameters()), **options)
    for step, spec in enumerate(config["steps"]):
        ids = make_ids(spec, module.max_id, seed + step)

        def forward(ids: Any = ids, step: int = step) -> Any:
            torch.manual_seed(seed + step)  # of the dropout masks
            out = module(ids)
            kept.append(out)
            return out, out.dtype, out.is_contiguous(), out.requires_grad

        def loss(step: int = step) -> Any:
            out = kept[-1]
            factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed - step))
            total = (out.abs() * factors).square().sum()
            if module.regularizer is not None and config["pop"]:
                total = total + module.regularizer.pop_regularization_term().sum()
            kept.append(total)
            return total

        def backward() -> Any:
            optimizer.zero_grad()
            if kept[-1].requires_grad:
                kept[-1].backward()
                optimizer.step()
            return [p.grad for p in module.parameters()], list(module.parameters())

        def constrain() -> Any:
            for part in module.modules():
                if hasattr(part, "post_parameter_update"):
                    part.post_parameter_update()
            return list(module.parameters())

        for stage, function in (
            ("forward", forward),
            ("loss", loss),
            ("backward", backward),
            ("constrain", constrain),
        ):
            record.stage(stage, function)
    module.eval()
    with torch.no_grad():
        record.stage("all", lambda: module(None))
    if config["bad"] is not None:
        record.stage("bad ids", lambda: module(make_bad_ids(config["bad"], module.max_id)))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"rtol": max(1e-6, 4 * eps), "atol": max(1e-7, eps)}


def differences(
    config: dict[str, Any], our: Callable[..., Any], their: Callable[..., Any]
) -> tuple[list[str], bool]:
    """Say where runs of two classes differ, and whether a gradient has moved a row."""
    ours, theirs = run(our, config), run(their, config)
    if ours.stages[-1][0] == "construct" and theirs.stages[-1][0] != "construct":
        # what a constrainer cannot do shows when it is probed, not after the first step
        got, expected = ours.stages[-1][3], probed(their, config)
        return ([] if got is expected else [f"probe: got {got}, expected {expected}"]), False
    grads = [
        value[0] for name, value, _, _ in ours.stages if name == "backward" and value is not None
    ]
    return _compare(ours, theirs), any(
        grad is not None and bool(grad.any()) for part in grads for grad in part
    )


def built_in(error: type[Exception]) -> type:
    """Return the built-in class that one of ours stands for."""
    return next(base for base in error.__mro__ if base.__module__ == "builtins")


def _compare(ours: Record, theirs: Record) -> list[str]:
    found: list[str] = []
    for mine, other in zip(ours.stages, theirs.stages, strict=False):
        name, value, categories, error = mine
        related = (
            error is not None
            and other[3] is not None
            and (issubclass(other[3], built_in(error)) or issubclass(error, other[3]))
        )
        same = related or error is other[3]
        if categories != other[2] or not same:
            found.append(f"{name}: got {categories}, {error}, expected {other[2:]}")
        leaves, expected = (torch.utils._pytree.tree_leaves(v) for v in (value, other[1]))
        if len(leaves) != len(expected):
            found.append(f"{name}: got {value}, expected {other[1]}")
        for a, b in zip(leaves, expected, strict=False):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                close = a.shape == b.shape and a.dtype == b.dtype
                if close and (a.dtype.is_floating_point or a.dtype.is_complex):
                    close = torch.allclose(a, b, equal_nan=True, **tolerance(a.dtype))
                if not close:
                    found.append(f"{name}: got {a}, expected {b}")
            elif a != b:
                found.append(f"{name}: got {a}, expected {b}")
        if found:
            return found
    if len(ours.stages) != len(theirs.stages):
        found.append(
            f"got stages {[s[::3] for s in ours.stages]}, expected"
            f" {[s[::3] for s in theirs.stages]}"
        )
    return found
