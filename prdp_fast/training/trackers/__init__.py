"""Where a run's numbers go beside metrics.jsonl: one file a tracker, behind the interface in base.py."""
