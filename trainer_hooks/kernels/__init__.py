"""Kernels: the two reductions that read most memory, in one pass each.

``choice`` says whether they run; ``gradient_launch``, ``row_launch`` and ``host_launch`` are what the other paths call
in their own place. On a CUDA device with Triton: only ``gradient_kernel`` and ``row_kernel`` import it, and they are
imported when they first run; one source serves Triton 3.6 and 3.7, and loops have bounds that are known when it is
compiled. In the host's memory: ``host_gradients.c``, which ``host_build`` has compiled where there is a C compiler.
"""
