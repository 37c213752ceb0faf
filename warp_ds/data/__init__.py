"""Data sets, prompt formats, collation, and the demo's generated text."""
