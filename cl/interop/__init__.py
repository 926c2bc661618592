"""Other platforms: their data and methods here, ours there. Nothing is imported before it is used."""
