"""Writing facts into a LoRA: the memory (`memory`), the objectives (`losses`), the guard (`anchors`) and the loop (`loop`)."""
