"""What the doctor looks at, a module each. A probe takes a `Machine` and returns findings; it may raise.

What needs torch is imported inside the probes, so that a torch that does not import costs one section and not the rest.
"""
