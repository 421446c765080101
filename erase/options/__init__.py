"""What a run is asked to do: options with meaning, default and range, recipes, and what a model folder brings."""
