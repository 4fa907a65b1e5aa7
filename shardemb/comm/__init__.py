"""Communication between ranks: collectives with timeouts, shared memory, the watchdog."""
