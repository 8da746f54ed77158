"""Our own minimal server behind OpenAI's HTTP API: `engine` batches, `protocol` reads and writes, `app` answers."""
