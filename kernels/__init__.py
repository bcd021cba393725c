"""Triton kernels of lrp_fast, reached as ``lrp_fast.kernels``: pure functions of NHWC tensors, a file for each kind of pass.

Their equations, bytes and FLOPs are in ``README.md`` beside this file; ``lrp_fast.backends.triton`` chooses among them.
"""
