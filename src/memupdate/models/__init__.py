"""The operator's base model: its folder (torch-free: `folder`), its weights in memory (`base`), and one forward pass (`scoring`)."""
