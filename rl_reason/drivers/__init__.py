"""What drives each kind of loop from the host: where its data comes from, and what a chunk of its steps leaves behind."""
