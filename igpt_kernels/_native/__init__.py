"""The compiled extension: how it is built, cached and loaded."""
