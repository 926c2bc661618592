"""What moves information between the tokens of a block: one file, one mixer, found by listing the folder.

The interface is in `cl/backbones/_mixer.py`; a block string such as `3x[linear_memory] + attention` names them.
"""
