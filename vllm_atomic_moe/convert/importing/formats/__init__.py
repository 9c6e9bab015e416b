"""The formats of other tools. Each file has the name of its format, and its `IMPORTER`."""
