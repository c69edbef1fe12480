"""Policy, optimizer, evaluation and reports."""
