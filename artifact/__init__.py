"""What every step shares: the model's config, the graph contract, the manifest and the errors. Imports no other room."""
