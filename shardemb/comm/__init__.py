"""Communication between ranks: collectives that end in time, shared memory, the watchdog."""
