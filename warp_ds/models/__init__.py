"""Which layers of which architecture: found by name and structure, and what transformers keeps to itself."""
