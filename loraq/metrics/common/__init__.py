"""Used by several metrics: image sets, file reading, features, results, intervals."""
