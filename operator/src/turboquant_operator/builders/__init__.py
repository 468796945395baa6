"""Manifests of the children, as pure functions of (object, plan).

`metadata` holds what all share, `arguments` what the engine is told, `deployment` its pods, `inspection` the
pod that reads a model, `children` the rest. `reconcile` decides which of them an object has.
"""
