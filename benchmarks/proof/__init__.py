"""The study of what a good proof is worth: see `__main__`."""
