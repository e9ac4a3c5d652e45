"""The CPU engine: algorithms chosen for each step and size, and the program that runs them."""
