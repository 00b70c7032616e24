"""What the commands do, each readable top to bottom: the public Python API. Heavy packages are imported when a step needs them."""
