"""Files, memory, logs, progress bars, metrics, types and checks for all packages."""
