"""How ranks talk to each other: collectives that end in time, shared memory, and the watchdog over peers."""
