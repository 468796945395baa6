"""TurboQuant KV-cache formats, the reference codec and the GPU kernels.

``formats`` and ``plans`` need only the standard library; everything that computes needs the ``torch`` extra.
"""
