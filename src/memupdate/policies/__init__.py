"""Policies: how facts are written, proved and served, as TOML files that an operator reads and copies.

Torch-free. Everything downstream receives values, never this file's text.
"""

from memupdate.policies.loader import (
    load_batch_values,
    load_policy,
    parse_policy,
    parse_resolved_policy,
    policy_path,
    shipped_policies,
)
from memupdate.policies.model import Policy

__all__ = [
    "Policy",
    "load_batch_values",
    "load_policy",
    "parse_policy",
    "parse_resolved_policy",
    "policy_path",
    "shipped_policies",
]
