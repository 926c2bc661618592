"""The cases are loaded by path, so that other tests may run them elsewhere."""

import importlib.util
import sys
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("card_cases", Path(__file__).with_name("card_cases.py"))
MODULE = importlib.util.module_from_spec(SPEC)
sys.modules["card_cases"] = MODULE
SPEC.loader.exec_module(MODULE)
