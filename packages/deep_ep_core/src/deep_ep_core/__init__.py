"""The ground of the deep-ep packages: transport, streams and events, topology, environment, errors, local launcher.

Import what you need from its modules; importing the package does no work.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
