"""Pictures made from image files and records: grids, heat maps, diagrams. They measure nothing."""
