"""A model cut into stages, one a rank, trained by the 1F1B schedule beside the whole model; see `__main__`.

Not part of the package's promise; `schedule` is meant to be read and copied.
"""
