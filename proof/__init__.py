"""Instruments that look for a double, a loss or a wrong order.

`make crash|simulate|soak|fuzz|mutants`; docs/GUARANTEES.md says what each has shown.
"""
