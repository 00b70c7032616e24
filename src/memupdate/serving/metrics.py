"""What our code inside vLLM counts, on vLLM's own `/metrics`.

vLLM serves the default registry of `prometheus_client`, or, where it runs several API servers, what all of them wrote to
`PROMETHEUS_MULTIPROC_DIR`, which it sets before our code is imported; plain counters work with both. Invariant: a label
is an alias or a release of the manifest, or one of a few fixed words, never what a client sent.
"""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_RESOLVE_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0)


class ServingMetrics:
    """The counters; one set per registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "memupdate_requests",
            "Inference requests handed to vLLM, by the alias asked for (empty: none), the release that answered "
            "(empty: the base model) and the HTTP status",
            ("alias", "release", "status"),
            registry=registry,
        )
        self.flips = Counter(
            "memupdate_flips", "Times that an alias was seen to point at another release", registry=registry
        )
        self.resolve = Histogram(
            "memupdate_resolve_seconds",
            "Time to look a release up and check its files, seconds",
            buckets=_RESOLVE_BUCKETS_S,
            registry=registry,
        )
        self.refusals = Counter(
            "memupdate_refusals", "Requests and releases that were refused, by reason", ("reason",), registry=registry
        )
        self.routed = Counter(
            "memupdate_routed",
            "Requests to an alias, by its route (always, matched) and where they went: release, base, or unreadable "
            "and no_matcher, which went to the release because the route could not be decided",
            ("mode", "decision"),
            registry=registry,
        )
        self.generation = Gauge(
            "memupdate_manifest_generation",
            "Generation of the manifest in force",
            multiprocess_mode="mostrecent",
            registry=registry,
        )
        self.max_rank = Gauge(
            "memupdate_max_lora_rank",
            "Largest rank of a release that this engine was started for; 0 where it was not told",
            multiprocess_mode="mostrecent",
            registry=registry,
        )


@lru_cache(maxsize=1)
def serving_metrics() -> ServingMetrics:
    """This process's counters, in the registry that vLLM serves."""
    return ServingMetrics(REGISTRY)
