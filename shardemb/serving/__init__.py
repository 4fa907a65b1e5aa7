"""Reads a checkpoint's rows: from files, from Ray actors, for other programs."""

from typing import TYPE_CHECKING

from shardemb.exceptions import ShardBusyError, ShardUnavailableError
from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb.serving.export import export_table, import_table
    from shardemb.serving.ray_service import Client, Service, ShardHealth, connect, serve
    from shardemb.serving.store import Store, open_store

__all__ = [
    "Client",
    "Service",
    "ShardBusyError",
    "ShardHealth",
    "ShardUnavailableError",
    "Store",
    "connect",
    "export_table",
    "import_table",
    "open_store",
    "serve",
]

_MODULES = {
    **dict.fromkeys(("Store", "open_store"), "store"),
    **dict.fromkeys(("export_table", "import_table"), "export"),
    **dict.fromkeys(("Client", "Service", "ShardHealth", "connect", "serve"), "ray_service"),
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
