"""The GPU engine: algorithms for each step, chosen by a cost model or by timing, replayed as CUDA graphs."""
