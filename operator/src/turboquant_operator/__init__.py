"""Kubernetes operator that plans and runs vLLM on a TurboQuant-compressed KV cache.

Layers, none of which imports upward: ``handlers`` (kopf) and ``cli`` (`tq plan`), ``reconcile``, then
``planner``, ``builders`` and ``status`` (pure), then ``api`` (the types).
"""
