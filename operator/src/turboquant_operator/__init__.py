"""Kubernetes operator that plans and runs vLLM on a TurboQuant-compressed KV cache.

Layers, none of which imports upward: ``handlers`` (kopf: when) and ``cli`` (`tq plan`); ``controller`` (one
pass over one object) and ``planning`` with the edges ``kube``, ``model_reader`` and ``engine_capacity``; the
pure core: ``reconcile`` (what the children should be), ``status`` (what the user is told), ``inspection``,
``problems``, ``builders`` and ``planner``; ``api`` (the types).
"""
