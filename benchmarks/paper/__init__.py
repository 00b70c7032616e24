"""The benchmarks of the memory law's paper (arXiv 2605.30260): their data, their cells, what is made of them."""
