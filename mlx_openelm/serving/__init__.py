"""The HTTP server: OpenAI's protocol on the engine."""
