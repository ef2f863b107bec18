"""What a run shows: its log, the figures in it, alarms, curves, trackers."""
