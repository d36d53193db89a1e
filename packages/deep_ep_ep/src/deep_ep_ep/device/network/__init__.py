"""The device backend where load and store do not reach all ranks: between nodes rows go over NCCL's GIN.

`backend` is what the device backend opens there. Nothing is compiled, and no device is touched, at import.
"""
