"""The measured claims: each folder prints tables, and one JSON object as its last line."""
