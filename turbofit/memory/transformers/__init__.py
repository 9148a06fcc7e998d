"""The memory account of Hugging Face Transformers: one process, one request at a time."""
