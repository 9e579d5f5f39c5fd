"""What a server needs. No model, and nothing of a client."""
