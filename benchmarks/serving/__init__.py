"""What clients notice of updates: flips under load, replicas that die, and what our code inside vLLM costs."""
