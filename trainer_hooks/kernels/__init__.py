"""Kernels: the two reductions that read most memory, in one pass each, where there is a CUDA device and Triton.

``choice`` says whether they run; ``gradient_launch`` and ``row_launch`` are what the torch paths call in their own
place. Only ``gradient_kernel`` and ``row_kernel`` import Triton, and they are imported when they first run. One source
serves Triton 3.6 and 3.7; loops have bounds that are known when it is compiled.
"""
