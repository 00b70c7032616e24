"""The command line: parse, call an operation, render what it returns. No logic lives here.

Invariant: importing this package, and `--help` of any command, loads none of torch, transformers, vllm, peft and scipy;
a test looks into `sys.modules`. Commands import their operation when they run.
"""

from memupdate.cli.root import app, main

__all__ = ["app", "main"]
