"""Does the budget choose the right rank? Held-out batches, each trained at the ranks around its plan."""
