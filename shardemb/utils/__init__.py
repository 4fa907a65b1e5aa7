"""What every package below uses: files, memory, progress bars, a run's metrics, types, checks of settings."""
