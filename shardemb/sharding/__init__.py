"""Row-sharded tables.

Who owns which row, the exchange between ranks, and the memory and update of a shard.
"""
