"""The device backend: messages by copy engines and words in memory, between GPUs that reach each other, or over GIN.

`deep_ep_pp.buffer` imports it where it is tried, and nowhere else.
"""
