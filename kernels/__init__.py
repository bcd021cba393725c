"""Triton kernels of lrp_fast, reached as ``lrp_fast.kernels``; none is here yet (see CHANGELOG.md)."""
