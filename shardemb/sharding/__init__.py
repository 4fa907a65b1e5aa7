"""Row-sharded tables: who owns which row, the exchange between ranks, and the memory and update of a shard."""
