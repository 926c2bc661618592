"""Rules of the mixer neural_memory, one a file: what is remembered, judged, kept and stepped."""
