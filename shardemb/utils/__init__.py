"""What every package below uses.

Files, memory, progress bars, a run's metrics, types, checks of settings.
"""
