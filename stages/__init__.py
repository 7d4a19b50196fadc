"""What runs: one stage = one module = one command, `python -m stages.<stage>`."""
