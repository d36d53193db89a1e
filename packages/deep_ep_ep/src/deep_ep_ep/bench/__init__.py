"""Owns the benchmark of dispatch and combine: `python -m deep_ep_ep.bench`. It is no API; run it, and read its records.

`cases` says what is run and what it must move, `suites` which cases belong together. `tasks` and `baseline` run them,
`expected` knows what must come out, `measure` takes the time, `report` prints.
"""
