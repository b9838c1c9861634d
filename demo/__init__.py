"""The whole story on one machine: `python -m demo`. The function never imports it."""
