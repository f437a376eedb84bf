"""Trained systems for others: bare weights (files.py), or a folder with all that sampling needs,
its model card and its samples (folder.py, card.py, samples.py)."""
