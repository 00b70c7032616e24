"""The report's plots, one module each; `theme` has what they share. Matplotlib is imported when one is drawn."""
