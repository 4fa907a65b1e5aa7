"""Row-sharded tables: placement, exchange between ranks, a shard's memory and update."""
