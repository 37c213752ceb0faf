"""Every flag: its group, default and help, how it is parsed and what it may not be."""
