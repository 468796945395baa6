"""Kubernetes operator that plans and runs vLLM on a TurboQuant-compressed KV cache.

Layers, none of which imports upward: ``handlers`` (kopf: when) and ``cli`` (`tq plan`), ``controller`` (one
pass over one object) with its edges ``kube``, ``engine_capacity``, ``model_source`` and ``metrics``, then the
pure core: ``reconcile`` (what the children should be) and ``status`` (what the user is told), ``planner``,
``builders`` and ``problems``, then ``api`` (the types).
"""
