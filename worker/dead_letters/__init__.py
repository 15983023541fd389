"""Dead letters: reading, filtering and showing them."""
