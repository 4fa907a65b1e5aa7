"""What every package uses: files, memory, logs, progress bars, metrics, types, checks."""
