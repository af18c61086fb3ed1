"""The commands of `igpt`: options, progress, output files and wording. No torch at the top of a module."""
