"""Several processes that work as one: who they are, how they meet, what they share. Knows nothing of models, facts or training."""
