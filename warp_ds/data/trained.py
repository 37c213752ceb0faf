"""The choices of what is trained, and of what becomes of samples that are too long: for the flags, without a library."""

TRAIN_ON = ("assistant", "last", "all")
"""Every assistant turn, the last one, or every token."""
LONG_SAMPLES = ("error", "truncate", "drop")
"""Of samples that leave no room for a trained token within --max_length; 'drop' those that would be cut, too."""
