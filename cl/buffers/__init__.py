"""Stored rows of past experiences: who stays when the store is full, and which rows are drawn."""
