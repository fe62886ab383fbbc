"""Recipe of the embedded text-to-image model: fetch, split, train, export, inspect and evaluate."""
