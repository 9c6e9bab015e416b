"""The API server's side: the admin endpoint, its access and metrics, and its client."""
