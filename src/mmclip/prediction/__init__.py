"""Scoring images without labels: what `mmclip predict` and the Python API share."""
