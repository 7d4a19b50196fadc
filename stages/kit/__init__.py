"""Functions and small modules that methods, targets, tasks and stages call; it never calls them."""
