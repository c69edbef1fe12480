"""What scores a finished clip."""
