"""Watching a run: its log, the figures in it, alarms, curves, trackers."""
