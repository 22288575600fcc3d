"""A user's module: what it may be, made once, copied, and put back."""
