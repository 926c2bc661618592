"""How a matrix memory is written and read: one file, one rule, found by listing the folder.

The interface is in `cl/backbones/memory_rules/_rule.py`; `linear_memory(rule=NAME)` names them.
"""
