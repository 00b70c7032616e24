"""The memory law: what was measured, the laws fitted to it, and their uncertainty.

Invariant: importing this package loads numpy at most; never torch. Fits are deterministic functions of points and seed.
"""
