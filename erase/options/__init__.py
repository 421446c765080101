"""Options of a run: meaning, default and range of each, recipes, and defaults of a model folder."""
