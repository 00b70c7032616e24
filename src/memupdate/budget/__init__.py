"""From law, limits and counts to a plan. Torch-free; reads no files and no ledger."""
