"""Measurements of this repository. Nothing here is imported by what it measures."""
