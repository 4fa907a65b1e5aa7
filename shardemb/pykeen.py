"""The bridge to PyKEEN (``pip install shardemb[pykeen]``): a sharded ``Representation``.

Pass :class:`ShardedEmbedding` to a model, a pipeline or an ``ERModel`` instead of
``pykeen.nn.Embedding``; :meth:`ShardedEmbedding.with_options` sets this package's options::

    table = ShardedEmbedding.with_options(seed=0)
    tables = dict(entity_representations=table, relation_representations=table)
    pipeline(dataset="nations", model="TransE", model_kwargs=tables)

PyKEEN's training loops use one process; docs/from-pykeen.md has a loop for several.
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
    """:class:`shardemb.Embedding` for PyKEEN's models and loops, by default with dense gradients.

    PyKEEN's default optimizer, Adam, takes no sparse gradients. With ``kernel="sparse"`` choose
    "SGD", "Adagrad", "SparseAdam" or one of :mod:`shardemb.optim`, also by name. PyKEEN resolves
    the name "ShardedEmbedding" to this class.

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
        # models collect terms of PyKEEN's own regularizers only
        regularizer = regularizer_resolver.make_safe(regularizer, regularizer_kwargs)
        super().__init__(*args, kernel=kernel, regularizer=regularizer, **kwargs)

    @classmethod
    def with_options(cls, **options: Any) -> type["ShardedEmbedding"]:
        """Return this class with other defaults, for models that choose their tables' arguments.

        Args:
            options: keyword arguments of :class:`shardemb.Embedding`; arguments at construction
                override them.

        Raises:
            TypeError: an unknown argument.
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
            # make instances of the plain class, which can be pickled; a user's subclass stays
            # itself
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
