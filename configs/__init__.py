"""Hydra's config tree, importable so that an installed wheel finds it as `pkg://configs`."""
