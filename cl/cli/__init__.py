"""The commands; the only importer of hydra."""
