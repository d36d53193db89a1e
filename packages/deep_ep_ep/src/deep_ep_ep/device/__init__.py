"""The device backend: dispatch and combine by CUDA kernels that reach the peers' memory by load and store.

`backend` is what `ElasticBuffer` uses. Nothing is compiled, and no device is touched, at import.
"""
