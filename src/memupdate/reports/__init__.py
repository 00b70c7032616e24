"""Rendering only: dataclasses in, Rich renderables or pictures out. Nothing here computes a figure that others need."""
