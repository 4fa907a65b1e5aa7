"""The bridge to PyKEEN (``pip install shardemb[pykeen]``).

A sharded table that is a ``pykeen.nn.Representation``.

Hand :class:`ShardedEmbedding` to a model, a pipeline or an ``ERModel`` in the place of
``pykeen.nn.Embedding``; options of our own go through :meth:`ShardedEmbedding.with_options`::

    table = ShardedEmbedding.with_options(seed=0)
    tables = dict(entity_representations=table, relation_representations=table)
    pipeline(dataset="nations", model="TransE", model_kwargs=tables)

PyKEEN's training loops are for one process. docs/from-pykeen.md has a loop for several.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from pykeen.nn import representation_resolver
from pykeen.nn.representation import Representation as PyKEENRepresentation
from pykeen.optimizers import optimizer_resolver
from pykeen.regularizers import regularizer_resolver

from shardemb import optim
from shardemb.embedding import Embedding
from shardemb.exceptions import InputError, InputTypeError
from shardemb.sharding.options import Fused


class ShardedEmbedding(Embedding, PyKEENRepresentation):
    """:class:`shardemb.Embedding` for PyKEEN's models and loops.

    Its arguments, with dense gradients by default.

    PyKEEN's default optimizer, Adam, takes no sparse gradients. With ``kernel="sparse"`` choose
    "SGD", "Adagrad", "SparseAdam", or one of :mod:`shardemb.optim`, by name too: "RowWiseAdagrad".
    The string "ShardedEmbedding" names this class wherever PyKEEN takes one.

    Raises:
        ValueError: ``kernel="fused"``: PyKEEN's loops look entities up several times a step, and
            run backward without a step to find the batch size, which would train.
    """

    def __init__(
        self,
        *args: Any,
        kernel: Any = "dense",
        regularizer: Any = None,
        regularizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kernel == "fused" or isinstance(kernel, Fused):
            raise InputError(
                "got kernel='fused' in a PyKEEN model, whose loops look entities up several times"
                " a step and run backward without a step: use kernel='sparse' with e.g."
                " optimizer='Adagrad', or 'dense'"
            )
        # models collect the terms of PyKEEN's own regularizers alone
        regularizer = regularizer_resolver.make_safe(regularizer, regularizer_kwargs)
        super().__init__(*args, kernel=kernel, regularizer=regularizer, **kwargs)

    @classmethod
    def with_options(cls, **options: Any) -> type["ShardedEmbedding"]:
        """Return this class with other defaults.

        For PyKEEN's models that set the arguments of their tables themselves.

        Args:
            options: keyword arguments of :class:`shardemb.Embedding`; those given at construction
                go before them.

        Raises:
            TypeError: an argument that there is not.
        """
        known = (
            inspect.signature(Embedding.__init__).parameters.keys()
            | inspect.signature(PyKEENRepresentation).parameters
        )
        known -= {"self", "kwargs"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise InputTypeError(
                f"with_options() got an unexpected keyword argument {unknown[0]!r}, expected one of"
                f" {sorted(known)}"
            )

        def new(kind: type, *args: Any, **kwargs: Any) -> Any:
            # instances are the plain class's, so that they can be pickled; a subclass of the user's
            # is one itself
            return cls(*args, **{**options, **kwargs}) if kind is made else cls.__new__(kind)

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            cls.__init__(self, *args, **{**options, **kwargs})

        body = {
            "__new__": new,
            "__init__": init,
            "__doc__": cls.__doc__,
            "__module__": cls.__module__,
        }
        made = type(cls.__name__, (cls,), body)
        return made


representation_resolver.register(ShardedEmbedding)
for _optimizer in (
    optim.SparseSGD,
    optim.SparseAdagrad,
    optim.RowWiseAdagrad,
    optim.LazyAdam,
    optim.RowWiseAdam,
):
    optimizer_resolver.register(_optimizer, raise_on_conflict=False)
