"""What fights forgetting: one file, one strategy, one config of the same name."""
