"""Networks that metrics run; their weights come with a package or from files of the user's."""
