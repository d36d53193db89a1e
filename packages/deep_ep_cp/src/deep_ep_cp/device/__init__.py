"""The device backend: slots written into the peers' windows by copy engines, and signals between streams. No SM.

`backend` is what `ContextBuffer` uses. Nothing touches a device at import.
"""
