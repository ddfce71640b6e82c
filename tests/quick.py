"""Flags under which XLA compiles quickly: programs of tests are tiny, slower code costs them nothing."""

import importlib.metadata

XLA_FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at a flag they do not know
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
