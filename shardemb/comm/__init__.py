"""How ranks talk to each other.

Collectives that end in time, shared memory, and the watchdog over peers.
"""
