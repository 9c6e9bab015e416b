"""The methods of pruning, one a file, which has the method's name and its `METHOD`."""
