"""The formats of other tools, one a file, which has the format's name and its `IMPORTER`."""
