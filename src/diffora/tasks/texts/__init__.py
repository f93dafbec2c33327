"""People's own texts with labels: reading the files, checking the rows, and dividing them."""
