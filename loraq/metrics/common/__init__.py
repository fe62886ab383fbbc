"""What metrics share: image sets, reading files, features, results, bootstrap intervals."""
