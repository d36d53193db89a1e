"""Owns the benchmark of messages: `python -m deep_ep_pp.bench`. It is no API; run it, and read its records.

`tasks` says what a case does, with this library and with torch, `measure` takes the time, `report` makes the records.
"""
