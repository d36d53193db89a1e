"""Owns the device backend: a table in the memory of GPUs, or in host memory that they map, fetched by CUDA kernels.

`backend` is where `EngramTable` enters. Imported only where the backend is tried.
"""
