"""From tokens to the sorted rows of their experts, and back."""
