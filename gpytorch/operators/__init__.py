"""What replaces methods of linear_operator's."""
